// Keyword arguments into a Call: every keyword is the name of a field, and this table is the one
// place where they are listed.
//
// Tensors come as addresses, what Tensor.data_ptr() gives (0: null), element types as their
// numbers, the rule as a dict of its own fields. What is not given keeps its default. TypeError
// names a keyword that is not a field, or whose value is not of the field's type.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>

#include "softcl/call.h"

namespace softcl {

namespace fields {

namespace py = pybind11;

[[noreturn]] inline void refuse(std::string_view name, py::handle value, const char* wanted) {
  PyErr_Clear();  // of the conversion that failed
  throw py::type_error(std::string(name) + "=" + py::repr(value).cast<std::string>() + " is not " +
                       wanted);
}

template <typename Integer>
Integer integer_of(std::string_view name, py::handle value, const char* wanted) {
  if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) refuse(name, value, wanted);
  if constexpr (std::is_unsigned_v<Integer>) {
    const auto number = PyLong_AsUnsignedLongLong(value.ptr());
    if (PyErr_Occurred() || number > std::numeric_limits<Integer>::max()) {
      refuse(name, value, wanted);
    }
    return static_cast<Integer>(number);
  } else {
    const auto number = PyLong_AsLongLong(value.ptr());
    if (PyErr_Occurred() || number < std::numeric_limits<Integer>::min() ||
        number > std::numeric_limits<Integer>::max()) {
      refuse(name, value, wanted);
    }
    return static_cast<Integer>(number);
  }
}

template <typename T>
T value_of(std::string_view name, py::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(integer_of<std::uintptr_t>(name, value, "an address (an int)"));
  } else if constexpr (std::is_enum_v<T>) {
    return T(integer_of<std::int32_t>(name, value, "an int of 32 bits"));
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!PyBool_Check(value.ptr())) refuse(name, value, "a bool");
    return value.ptr() == Py_True;
  } else if constexpr (std::is_integral_v<T>) {
    return integer_of<T>(name, value, "an int in its range");
  } else {
    static_assert(std::is_same_v<T, double>);
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred()) refuse(name, value, "a number");
    return number;
  }
}

template <typename Record>
using Table = std::unordered_map<std::string_view,
                                 void (*)(Record&, std::string_view name, py::handle value)>;

/// Every item of `given` into the field of its name. `what`: of which record, for the message.
template <typename Record>
void fill(Record& record, const Table<Record>& table, py::handle given, const char* what) {
  PyObject *key, *value;
  Py_ssize_t place = 0, length;
  while (PyDict_Next(given.ptr(), &place, &key, &value)) {
    const char* text = PyUnicode_AsUTF8AndSize(key, &length);
    if (text == nullptr) throw py::error_already_set();
    const std::string_view name(text, static_cast<std::size_t>(length));
    const auto found = table.find(name);
    if (found == table.end()) {
      throw py::type_error(std::string(name) + " is not a field of " + what);
    }
    found->second(record, name, value);
  }
}

template <auto kField, typename Record>
void set(Record& record, std::string_view name, py::handle value) {
  using Field = std::remove_reference_t<decltype(record.*kField)>;
  if constexpr (std::is_same_v<Field, LabelRule>) {
    static const Table<LabelRule> kTable = {
        {"positive", &set<&LabelRule::positive, LabelRule>},
        {"mean", &set<&LabelRule::mean, LabelRule>},
        {"confident_mean", &set<&LabelRule::confident_mean, LabelRule>},
        {"neighbor", &set<&LabelRule::neighbor, LabelRule>},
        {"confident_neighbor", &set<&LabelRule::confident_neighbor, LabelRule>},
        {"clip", &set<&LabelRule::clip, LabelRule>},
        {"num_neighbors", &set<&LabelRule::num_neighbors, LabelRule>},
        {"teacher_positive", &set<&LabelRule::teacher_positive, LabelRule>},
    };
    if (!PyDict_Check(value.ptr())) refuse(name, value, "a dict of a rule's fields");
    fill(record.*kField, kTable, value, "a rule");
  } else {
    record.*kField = value_of<Field>(name, value);
  }
}

}  // namespace fields

inline Call call_of(const pybind11::kwargs& given) {
  using fields::set;
  static const fields::Table<Call> kTable = {
      {"query", &set<&Call::query, Call>},
      {"key", &set<&Call::key, Call>},
      {"queue", &set<&Call::queue, Call>},
      {"vector_type", &set<&Call::vector_type, Call>},
      {"queue_type", &set<&Call::queue_type, Call>},
      {"num_queries", &set<&Call::num_queries, Call>},
      {"queue_size", &set<&Call::queue_size, Call>},
      {"dim", &set<&Call::dim, Call>},
      {"rule", &set<&Call::rule, Call>},
      {"temperature", &set<&Call::temperature, Call>},
      {"teacher_temperature", &set<&Call::teacher_temperature, Call>},
      {"positive", &set<&Call::positive, Call>},
      {"normalize", &set<&Call::normalize, Call>},
      {"num_threads", &set<&Call::num_threads, Call>},
      {"excluded", &set<&Call::excluded, Call>},
      {"loss", &set<&Call::loss, Call>},
      {"dquery", &set<&Call::dquery, Call>},
      {"confidence", &set<&Call::confidence, Call>},
      {"entropy", &set<&Call::entropy, Call>},
      {"positive_rank", &set<&Call::positive_rank, Call>},
      {"neighbor_indices", &set<&Call::neighbor_indices, Call>},
      {"lse", &set<&Call::lse, Call>},
      {"mean", &set<&Call::mean, Call>},
      {"neighbor_logits", &set<&Call::neighbor_logits, Call>},
  };
  Call call;
  fields::fill(call, kTable, given, "a call");
  return call;
}

}  // namespace softcl
