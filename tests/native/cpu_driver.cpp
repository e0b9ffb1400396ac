// Drives the CPU backend without Python, to be built with sanitizers
// (tests/test_cpu_sanitizers.py).
//
// Arrays have exactly their documented sizes and outputs hold NaN before a call, so that a read or
// a write past an end, a value that nobody wrote and a race all show. Every result is compared with
// formulas written out in double.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "softcl/call.h"
#include "softcl/crops.h"
#include "softcl/enqueue.h"
#include "softcl/views.h"

namespace {

using softcl::ElementType;
using softcl::LabelRule;
using softcl::TeacherPositive;

constexpr double kTemperature = 0.1, kTeacherTemperature = 0.05;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Unit rows, in fp32 or cut to bf16; `values` are what is stored.
struct Matrix {
  std::int64_t rows, dim;
  std::vector<float> values;
  std::vector<std::uint16_t> halves;
  ElementType type;

  Matrix(std::int64_t rows, std::int64_t dim, ElementType type, unsigned seed)
      : rows(rows), dim(dim), values(rows * dim), type(type) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < rows; ++i) {
      double squares = 0.0;
      for (std::int64_t d = 0; d < dim; ++d) {
        float& x = values[i * dim + d];
        x = normal(random);
        squares += double(x) * x;
      }
      for (std::int64_t d = 0; d < dim; ++d) values[i * dim + d] /= float(std::sqrt(squares));
    }
    if (type == ElementType::kFloat32) return;
    for (float& x : values) {
      std::uint32_t bits;
      static_assert(sizeof bits == sizeof x);
      std::copy_n(reinterpret_cast<const char*>(&x), sizeof x, reinterpret_cast<char*>(&bits));
      halves.push_back(std::uint16_t(bits >> 16));
      bits &= 0xffff0000u;
      std::copy_n(reinterpret_cast<const char*>(&bits), sizeof x, reinterpret_cast<char*>(&x));
    }
  }

  const void* data() const {
    if (type == ElementType::kFloat32) return values.data();
    return halves.data();
  }
  double dot(std::int64_t i, const Matrix& other, std::int64_t j) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < dim; ++d) {
      sum += double(values[i * dim + d]) * double(other.values[j * dim + d]);
    }
    return sum;
  }
};

// Exactly `count` elements, all NaN (or a number that no index is).
template <typename T>
std::unique_ptr<T[]> unwritten(std::int64_t count) {
  std::unique_ptr<T[]> array(new T[count]);
  const T nothing = std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN()
                                                          : std::numeric_limits<T>::max();
  std::fill_n(array.get(), count, nothing);
  return array;
}

// Rules that between them take every path: no teacher, its mean, neighbours, both, clipped, and a
// teacher's positive. The first one is of hard labels.
std::vector<LabelRule> rules(std::int64_t n) {
  LabelRule dense;
  dense.positive = 0.0;
  dense.mean = 1.0;
  dense.teacher_positive = TeacherPositive::kSelf;
  LabelRule clipped;
  clipped.confident_mean = double(n);
  clipped.clip = true;
  clipped.num_neighbors = n;
  LabelRule nearest;
  nearest.neighbor = 1.0;
  nearest.num_neighbors = n;
  LabelRule every;
  every.positive = 0.3;
  every.mean = 0.7;
  every.confident_mean = 0.5;
  every.neighbor = 0.2;
  every.confident_neighbor = 0.4;
  every.num_neighbors = n;
  every.teacher_positive = TeacherPositive::kZero;
  return {LabelRule(), dense, clipped, nearest, every};
}

void check_loss(const Matrix& query, const Matrix& key, const Matrix& queue, const LabelRule& rule,
                bool is_hard, bool excludes, int threads) {
  const std::int64_t N = query.rows, K = queue.rows, D = query.dim, n = rule.num_neighbors;
  const auto loss = unwritten<float>(N), dquery = unwritten<float>(N * D);
  const auto confidence = unwritten<float>(N), entropy = unwritten<float>(N);
  const auto rank = unwritten<std::int64_t>(N), neighbors = unwritten<std::int64_t>(N * n);
  softcl::Call p;
  p.query = query.data();
  p.key = key.data();
  p.queue = queue.data();
  p.vector_type = query.type;
  p.queue_type = queue.type;
  p.num_queries = N;
  p.queue_size = K;
  p.dim = D;
  p.rule = rule;
  p.temperature = kTemperature;
  p.teacher_temperature = kTeacherTemperature;
  p.normalize = true;
  p.num_threads = threads;
  const auto excluded = unwritten<std::int64_t>(N);
  for (std::int64_t i = 0; i < N; ++i) excluded[i] = i % (K + 1) - 1;
  if (excludes) p.excluded = excluded.get();
  p.loss = loss.get();
  p.dquery = dquery.get();
  p.confidence = confidence.get();
  p.entropy = entropy.get();
  p.positive_rank = rank.get();
  p.neighbor_indices = neighbors.get();
  softcl::cpu::run(p);
  for (std::int64_t i = 0; i < N * D; ++i) require(std::isfinite(dquery[i]), "gradient written");
  for (std::int64_t i = 0; i < N * n; ++i) {
    require(neighbors[i] >= 0 && neighbors[i] < K, "neighbours are rows of the queue");
  }
  for (std::int64_t i = 0; i < N; ++i) {
    require(rank[i] >= 0 && rank[i] <= K, "rank");
    if (!is_hard) {
      require(std::isfinite(loss[i]), "loss written");
      continue;
    }
    const double own = query.dot(i, key, i) / kTemperature;
    double sum = std::exp(own);
    for (std::int64_t j = 0; j < K; ++j) {
      if (!(excludes && j == excluded[i])) sum += std::exp(query.dot(i, queue, j) / kTemperature);
    }
    // bf16 vectors are rounded again after their normalisation.
    const double bound = query.type == ElementType::kFloat32 ? 1e-4 : 0.3;
    require(std::abs(std::log(sum) - own - loss[i]) < bound, "loss of hard labels");
  }
}

void check_statistics(const Matrix& vectors, const Matrix& queue, std::int64_t k, bool sums,
                      int threads) {
  const std::int64_t N = vectors.rows, K = queue.rows, D = vectors.dim;
  const auto lse = unwritten<float>(N), mean = unwritten<float>(N * D);
  const auto entropy = unwritten<float>(N), logits = unwritten<float>(N * k);
  const auto indices = unwritten<std::int64_t>(N * k);
  softcl::Call p;
  p.query = vectors.data();
  p.queue = queue.data();
  p.vector_type = vectors.type;
  p.queue_type = queue.type;
  p.num_queries = N;
  p.queue_size = K;
  p.dim = D;
  p.rule.num_neighbors = k;
  p.temperature = kTemperature;
  p.num_threads = threads;
  if (sums) {
    p.lse = lse.get();
    p.mean = mean.get();
    p.entropy = entropy.get();
  }
  p.neighbor_logits = logits.get();
  p.neighbor_indices = indices.get();
  softcl::cpu::run(p);
  std::vector<double> exact(K);
  for (std::int64_t i = 0; i < N; ++i) {
    double sum = 0.0;
    for (std::int64_t j = 0; j < K; ++j) {
      exact[j] = vectors.dot(i, queue, j) / kTemperature;
      sum += std::exp(exact[j]);
    }
    if (sums) require(std::abs(std::log(sum) - lse[i]) < 1e-4, "lse");
    for (std::int64_t a = 0; a < k; ++a) {
      const std::int64_t index = indices[i * k + a];
      require(index >= 0 && index < K, "neighbours are rows of the queue");
      require(std::abs(exact[index] - logits[i * k + a]) < 1e-4, "logits of neighbours");
    }
    if (k == 0) continue;
    std::nth_element(exact.begin(), exact.begin() + (k - 1), exact.end(), std::greater<>());
    require(std::abs(exact[k - 1] - logits[i * k + k - 1]) < 1e-4, "the k-th neighbour");
  }
}

void check_enqueue(std::int64_t num_keys, std::int64_t size, std::int64_t dim) {
  const Matrix keys(num_keys, dim, ElementType::kFloat32, 5);
  const auto ring = unwritten<float>(size * dim);
  std::int64_t refused = 0;
  softcl::cpu::enqueue({keys.data(), ring.get(), &refused, num_keys, size, dim, size - 1,
                        ElementType::kFloat32, ElementType::kFloat32, true});
  require(refused == 0, "no key is refused");
  const std::int64_t last = (size - 1 + num_keys - 1) % size;
  for (std::int64_t d = 0; d < dim; ++d) {
    const float expected = keys.values[(num_keys - 1) * dim + d];
    require(std::abs(ring[last * dim + d] - expected) < 1e-6f, "the last key is in its slot");
  }
}

// Weight of input j (of `length`) in output i (of `size`), not divided by its row's sum.
double triangle(std::int64_t i, std::int64_t j, std::int64_t length, std::int64_t size) {
  const double scale = double(length) / double(size), reach = std::max(scale, 1.0);
  return std::max(0.0, 1.0 - std::abs(double(j) + 0.5 - (double(i) + 0.5) * scale) / reach);
}

double resized(const std::uint8_t* channel, std::int64_t W, const float* row, std::int64_t y,
               std::int64_t x, std::int64_t size) {
  using Column = softcl::ViewColumn;
  const std::int64_t h = row[Column::kHeight], w = row[Column::kWidth];
  channel += std::int64_t(row[Column::kTop]) * W + std::int64_t(row[Column::kLeft]);
  if (row[Column::kMirror] != 0.0f) x = size - 1 - x;
  double sum = 0.0, total = 0.0;
  for (std::int64_t a = 0; a < h; ++a) {
    for (std::int64_t b = 0; b < w; ++b) {
      const double weight = triangle(y, a, h, size) * triangle(x, b, w, size);
      sum += weight * channel[a * W + b];
      total += weight;
    }
  }
  return sum / total / 255.0;
}

void check_views(std::int64_t N, std::int64_t H, std::int64_t W, std::int64_t size, int threads) {
  using Column = softcl::ViewColumn;
  std::mt19937 random(11);
  const auto draw = [&](std::int64_t least, std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(least, most)(random);
  };
  const auto images = unwritten<std::uint8_t>(N * 3 * H * W);
  for (std::int64_t i = 0; i < N * 3 * H * W; ++i) images[i] = std::uint8_t(draw(0, 255));
  const auto table = unwritten<float>(N * Column::kCount);
  for (std::int64_t n = 0; n < N; ++n) {
    float* const row = table.get() + n * Column::kCount;
    row[Column::kHeight] = draw(1, H);
    row[Column::kWidth] = draw(1, W);
    row[Column::kTop] = H - row[Column::kHeight];  // the crop ends with the image
    row[Column::kLeft] = W - row[Column::kWidth];
    row[Column::kMirror] = draw(0, 1);
    row[Column::kJittered] = draw(0, 3) > 0;
    row[Column::kOrder] = draw(0, 23);
    for (int i = 0; i < 3; ++i) row[Column::kFactor + i] = draw(0, 20) / 10.0f;
    row[Column::kHue] = draw(-5, 5) / 10.0f;
    row[Column::kGrayed] = draw(0, 4) == 0;
    row[Column::kBlurred] = draw(0, 2) > 0;
    row[Column::kSigma] = draw(0, 40) / 10.0f;
    row[Column::kSolarized] = draw(0, 1);
  }
  const float constants[] = {4.0f, 4.0f, 4.0f, -2.0f, -2.0f, -2.0f};
  for (const bool colors : {false, true}) {
    const auto views = unwritten<float>(N * 3 * size * size);
    softcl::ViewsParams p;
    p.images = images.get();
    p.table = table.get();
    p.constants = constants;
    p.views = views.get();
    p.num_images = N;
    p.height = H;
    p.width = W;
    p.size = size;
    p.colors = colors;
    p.num_threads = threads;
    softcl::cpu::views(p);
    for (std::int64_t i = 0; i < N * 3 * size * size; ++i) {
      require(views[i] >= -2.0001f && views[i] <= 2.0001f, "pixels written, in their range");
      if (colors) continue;
      const std::int64_t channel = i / (size * size), y = i / size % size, x = i % size;
      const double expected = resized(images.get() + channel * H * W, W,
                                      table.get() + channel / 3 * Column::kCount, y, x, size);
      require(std::abs(expected * 4.0 - 2.0 - views[i]) < 1e-4, "the crop resized");
    }
  }
}

// The last crop ends with the image, and the image and the result with their memory.
void check_crops(std::int64_t H, std::int64_t W, std::int64_t rows, std::int64_t columns) {
  std::mt19937 random(12);
  const auto pixels = unwritten<std::uint8_t>(H * W * 4);
  for (std::int64_t i = 0; i < H * W * 4; ++i) pixels[i] = std::uint8_t(random() % 256);
  const auto result = unwritten<std::uint8_t>(3 * rows * columns);
  for (const double share : {0.0, 0.37, 0.5}) {
    softcl::CropsParams p;
    p.pixels = pixels.get();
    p.height = H;
    p.width = W;
    const double top = share * H, left = share * W;
    p.crops.push_back({top, left, H - top, W - left, rows, columns, result.get()});
    softcl::cpu::crops(p);
    for (std::int64_t c = 0; c < 3 && H == 1 && W == 1; ++c) {
      require(result[c * rows * columns] == pixels[c], "a pixel enlarged");
    }
  }
}

}  // namespace

int main() {
  const std::int64_t shapes[][3] = {
      {1, 1, 1}, {17, 97, 65}, {70, 2000, 33}, {33, 131, 300}, {200, 150, 17}};
  const ElementType types[] = {ElementType::kFloat32, ElementType::kBFloat16};
  for (const auto& [N, K, D] : shapes) {
    for (const ElementType type : types) {
      const Matrix query(N, D, type, 1), key(N, D, type, 2), queue(K, D, type, 3);
      for (const std::int64_t n : {std::int64_t{0}, std::min<std::int64_t>(K, 20)}) {
        bool is_hard = true;
        for (const LabelRule& rule : rules(n)) {
          check_loss(query, key, queue, rule, is_hard, false, 3);
          if (n < K && K > 1) check_loss(query, key, queue, rule, is_hard, true, 3);
          is_hard = false;
        }
      }
      for (const std::int64_t k : {0, 1, 5, 90}) {
        const std::int64_t some = std::min<std::int64_t>(k, K);
        check_statistics(query, queue, some, true, 3);
        if (some > 0) check_statistics(query, queue, some, false, 3);
      }
    }
  }
  const std::int64_t sides[][3] = {{1, 1, 1}, {32, 32, 32}, {17, 40, 33}, {48, 64, 7}, {3, 90, 5}};
  for (const auto& [H, W, size] : sides) check_views(7, H, W, size, 3);
  for (const auto& [H, W, size] : sides) {
    check_crops(H, W, size, size);
    check_crops(H, W, 2 * size + 1, size + 3);
  }
  for (const std::int64_t num_keys : {1, 7, 40}) check_enqueue(num_keys, 16, 33);
  std::puts("clean");
}
