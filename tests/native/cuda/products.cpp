// See warpgroup.h: products of warpgroups.

#include <algorithm>
#include <cstring>

#include "emulated_ptx.h"
#include "hopper_state.h"

namespace softcl::cuda::host {

namespace {

// A matrix of 16-bit numbers in shared memory, as its descriptor has it.
struct SharedMatrix {
  std::uint32_t start, leading, stride;

  explicit SharedMatrix(std::uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) report("a descriptor without 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0) report("a descriptor with a base offset");
  }

  // T = 8 elements of 16 bytes. K-major: Swizzle<3,4,3> o ((8,m),(T,2k)):((8T,SBO),(1,T)).
  std::uint32_t k_major(int row, int k) const {
    return swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
  }
  // MN-major: Swizzle<3,4,3> o ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)).
  std::uint32_t mn_major(int n, int k) const {
    return swizzled(start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128);
  }
};

// Reads all elements, two at a time where they are neighbours, and watches the reads.
template <typename Address, typename Take>
void read_matrix(int rows, int columns, const Visit& visit, Address address, Take take) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; j += 2) {
      const std::uint32_t first = address(i, j);
      h.visit(first, 4, visit);
      std::uint16_t x[2];
      std::memcpy(x, h.shared_ + first, 4);
      take(i, j, x[0]);
      take(i, j + 1, x[1]);
    }
  }
}

float* accumulators_of(ThreadState& thread, const Product& p) {
  for (Owned& owned : thread.owned) {
    if (owned.c != p.c) continue;
    if (owned.columns != p.columns) report("two shapes of products on the same accumulators");
    owned.group = thread.committed + 1;
    return owned.values.data();
  }
  const int count = p.columns / 2;
  thread.owned.push_back({p.c, p.columns, thread.committed + 1, {p.c, p.c + count}});
  std::memset(p.c, 0xff, count * sizeof(float));
  return thread.owned.back().values.data();
}

// The last of the warpgroup's threads runs the product.
void multiply(WarpgroupState& group, int first_thread) {
  const Product& p = *group.lanes[0];
  // It reads what all of the threads know to be there.
  static Knowledge common;
  common = h.threads_[first_thread].knowledge;
  for (int t = 1; t < kWarpgroup; ++t) {
    const Knowledge& other = h.threads_[first_thread + t].knowledge;
    for (int i = 0; i < h.agents_; ++i) {
      common.known[i] = std::min(common.known[i], other.known[i]);
      common.fenced[i] = std::min(common.fenced[i], other.fenced[i]);
    }
  }
  const Visit visit{h.product_agent(), ++group.products, false, true, &common};
  static float a[64][16], b[32][16][8], c[256];  // b: by eight columns
  if (p.fragment == nullptr) {
    const SharedMatrix matrix(p.a);
    read_matrix(
        64, 16, visit, [&](int i, int k) { return matrix.k_major(i, k); },
        [&](int i, int k, std::uint16_t x) { a[i][k] = p.to_float(x); });
  } else {
    for (int t = 0; t < kWarpgroup; ++t) {
      const int row = t / 32 * 16 + t % 32 / 4;
      for (int i = 0; i < 8; ++i) {
        a[row + i / 2 % 2 * 8][t % 4 * 2 + i / 4 * 8 + i % 2] =
            p.to_float(static_cast<std::uint16_t>(group.lanes[t]->fragment[i / 2] >> i % 2 * 16));
      }
    }
  }
  const SharedMatrix matrix(p.b);
  if (p.transposed) {
    read_matrix(
        16, p.columns, visit, [&](int k, int n) { return matrix.mn_major(n, k); },
        [&](int k, int n, std::uint16_t x) { b[n / 8][k][n % 8] = p.to_float(x); });
  } else {
    read_matrix(
        p.columns, 16, visit, [&](int n, int k) { return matrix.k_major(n, k); },
        [&](int n, int k, std::uint16_t x) { b[n / 8][k][n % 8] = p.to_float(x); });
  }
  // Four threads hold a row: element 4 n + 2 i + e of thread t is column 8 n + 2 (t % 4) + e.
  for (int row = 0; row < 64; ++row) {
    const int i = row / 8 % 2, first = row / 16 * 32 + row % 8 * 4;
    float* held[4];
    for (int t = 0; t < 4; ++t) {
      held[t] = accumulators_of(h.threads_[first_thread + first + t], *group.lanes[first + t]);
    }
    for (int n = 0; n < p.columns / 8; ++n) {
      for (int j = 0; j < 8; ++j) c[j] = p.add ? held[j / 2][4 * n + 2 * i + j % 2] : 0.0f;
      ptx::add_products(c, a[row], b[n]);
      ptx::add_products(c, a[row] + 8, b[n] + 8);
      for (int j = 0; j < 8; ++j) held[j / 2][4 * n + 2 * i + j % 2] = c[j];
    }
  }
}

}  // namespace

void start_product(const Product& product) {
  ThreadState& self = h.self();
  const bool owned = std::any_of(self.owned.begin(), self.owned.end(),
                                 [&](const Owned& o) { return o.c == product.c; });
  if (!self.fenced && !(owned && product.fragment == nullptr)) {
    report("a product without wgmma.fence since its registers were accessed");
  }
  ++self.open;
  if (product.fragment != nullptr) {
    Fragment fragment{product.fragment, {}, self.committed + 1};
    std::memcpy(fragment.values, product.fragment, sizeof(fragment.values));
    self.fragments.push_back(fragment);
  }
  WarpgroupState& group = h.group();
  const int first = current_thread() / kWarpgroup * kWarpgroup;
  group.lanes[current_thread() - first] = &product;
  if (++group.arrived < kWarpgroup) {
    suspend();
    return;
  }
  group.arrived = 0;
  for (int t = 0; t < kWarpgroup; ++t) {
    const Product& p = *group.lanes[t];
    if (p.a != product.a || p.b != product.b || p.columns != product.columns ||
        p.add != product.add || p.transposed != product.transposed) {
      report("threads of one warpgroup start different products");
    }
  }
  multiply(group, first);
  for (int t = 0; t < kWarpgroup; ++t) resume(first + t);
}

void fence_products(Site site) {
  if (is_kept(site)) h.self().fenced = true;
}

void commit_products(Site site) {
  if (!is_kept(site)) return;
  ThreadState& self = h.self();
  ++self.committed;
  self.open = 0;
  auto& last = h.group().last_of_group;
  if (last.size() <= self.committed) last.resize(self.committed + 1);
  last[self.committed] = h.group().products;
}

void wait_for_products(Site site, int pending) {
  if (!is_kept(site)) return;
  ThreadState& self = h.self();
  self.fenced = false;
  if (self.committed <= static_cast<std::uint64_t>(pending)) return;
  self.done = std::max(self.done, self.committed - pending);
  std::uint32_t& known = self.knowledge.known[h.product_agent()];
  known = std::max(known, h.group().last_of_group[self.done]);
  auto& fragments = self.fragments;
  for (const Fragment& f : fragments) {
    if (f.group <= self.done && std::memcmp(f.registers, f.values, sizeof(f.values)) != 0) {
      report("a fragment was overwritten while its product ran");
    }
  }
  fragments.erase(std::remove_if(fragments.begin(), fragments.end(),
                                 [&](const Fragment& f) { return f.group <= self.done; }),
                  fragments.end());
}

void settle(Site site, float* c) {
  if (!is_kept(site)) return;
  ThreadState& self = h.self();
  for (std::size_t i = 0; i < self.owned.size(); ++i) {
    const Owned& owned = self.owned[i];
    if (owned.c != c) continue;
    if (owned.group > self.done) report("accumulators settled while a product owns them");
    std::memcpy(c, owned.values.data(), owned.values.size() * sizeof(float));
    self.owned.erase(self.owned.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
}

}  // namespace softcl::cuda::host
