// The CUDA backend as a Python module that runs its kernels on the CPU, thread by thread (block.h).
// Built by tests/cuda_host.py and by nothing else. "Device memory" is any memory.

#include <pybind11/stl.h>

#include "bindings.h"
#include "block.h"
#include "emulated_ptx.h"
#include "hopper_layout.h"
#include "plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// (splits, tiles per split, chunk shift, chunks, filled chunks) for a device of
// `multiprocessors`.
std::tuple<int, int, int, int, int> plan_of(std::int64_t num_rows, std::int64_t queue_size, int dim,
                                            bool paired, int mean_rows, std::int64_t num_neighbors,
                                            int multiprocessors, int kernel_type, bool hopper,
                                            int shared_bytes) {
  using softcl::cuda::Pairing;
  const softcl::cuda::Plan plan = softcl::cuda::make_plan(
      {num_rows, queue_size, dim, paired ? Pairing::kPaired : Pairing::kSingle, mean_rows,
       num_neighbors, false, multiprocessors, softcl::ElementType(kernel_type), hopper,
       shared_bytes});
  return {plan.splits, plan.tiles_per_split, plan.chunk_shift, plan.num_chunks,
          plan.num_filled_chunks};
}

// Four blocks of 64 threads that exchange numbers with their neighbours: for the test of
// watch_global.
void exchange_in_global_memory(int block_stride, bool synchronize) {
  using namespace softcl::cuda;
  std::vector<float> numbers(4 * 64);
  host::run_grid(dim3(4), dim3(64), 0, [&] {
    float* mine = numbers.data() + blockIdx.x * block_stride;
    ptx::store_global(mine + threadIdx.x, 1.0f);
    if (synchronize) ptx::sync_threads();
    ptx::load_global(mine + (threadIdx.x ^ 1));
  });
}

}  // namespace

PYBIND11_MODULE(softcl_cuda_host, module) {
  module.doc() = "softcl's CUDA kernels, run on the CPU.";
  softcl::bind_cuda(module);
  module.def(
      "set_options",
      [](std::uint64_t seed, const std::string& omit, const std::string& flip) {
        softcl::cuda::host::set_options({seed, omit, flip});
      },
      "seed"_a = 0, "omit"_a = "", "flip"_a = "",
      "Draw the order of threads from `seed`; give the site `omit` (file:line) no effect; let the "
      "site `flip` wait for the other phase.");
  module.def("set_capability", &softcl::cuda::host::set_capability, "capability"_a,
             "The device's compute capability from now on, ten times: 80 at first.");
  module.def("set_multiprocessors", &softcl::cuda::host::set_multiprocessors, "count"_a,
             "Its multiprocessors from now on: 2 at first.");
  module.def("count_devices_set", &softcl::cuda::host::count_devices_set,
             "Calls of cudaSetDevice so far.");
  module.def("sites", &softcl::cuda::host::sites, "The barriers and waits met since set_options.");
  module.def("exchange_in_global_memory", &exchange_in_global_memory, "block_stride"_a,
             "synchronize"_a);
  module.def("plan", &plan_of, "num_rows"_a, "queue_size"_a, "dim"_a, "paired"_a, "mean_rows"_a,
             "num_neighbors"_a, "multiprocessors"_a, "kernel_type"_a = 1, "hopper"_a = false,
             "shared_bytes"_a = 228 << 10);
  module.def(
      "piece_offset",
      [](int dim, int row, int piece) {
        return dim == 64    ? softcl::cuda::piece_offset<64>(row, piece)
               : dim == 128 ? softcl::cuda::piece_offset<128>(row, piece)
                            : softcl::cuda::piece_offset<256>(row, piece);
      },
      "dim"_a, "row"_a, "piece"_a);
  module.def("piece_after", &softcl::cuda::piece_after, "address"_a, "distance"_a);
  module.def("box_offset", &softcl::cuda::box_offset, "rows"_a, "row"_a, "column"_a);
  module.def("row_descriptor", &softcl::cuda::row_descriptor, "tile"_a, "rows"_a, "k"_a);
  module.def("column_descriptor", &softcl::cuda::column_descriptor, "tile"_a, "rows"_a, "k"_a);
  module.def("accumulator_row", &softcl::cuda::accumulator_row, "lane"_a, "i"_a);
  module.def("accumulator_column", &softcl::cuda::accumulator_column, "lane"_a, "i"_a);
  module.def(
      "hopper_shape",
      [](int dim, bool paired, int mean_rows, int kernel_type) {
        using softcl::cuda::Pairing;
        const auto shape =
            softcl::cuda::hopper_shape(softcl::ElementType(kernel_type), dim,
                                       paired ? Pairing::kPaired : Pairing::kSingle, mean_rows);
        return std::make_tuple(shape.rows_per_block, shape.tile_rows, shape.shared_bytes);
      },
      "dim"_a, "paired"_a, "mean_rows"_a, "kernel_type"_a = 1);
  module.def("split_line", &softcl::cuda::split_line, "lane"_a, "half"_a);
  module.def("split_piece", &softcl::cuda::split_piece, "lane"_a);
  module.def("line_offset", &softcl::cuda::line_offset, "line"_a, "byte"_a);
  module.def("chunk_column", &softcl::cuda::chunk_column, "chunk"_a, "i"_a, "chunk_shift"_a);
  module.def("chunk_of", &softcl::cuda::chunk_of, "step"_a, "lane"_a, "chunk_shift"_a);
}
