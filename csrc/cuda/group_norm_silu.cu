// group_norm_silu, forward.
//
// Where a slice fits into the shared memory of a cluster's blocks, one kernel reads it once: moments, an
// exchange between the blocks, and the result from shared memory. Otherwise two kernels, moments and apply,
// over as many samples at a time as stay in the L2 cache from one to the other.
#include "norm.cuh"

namespace sr3fast::cuda {
namespace {

constexpr int kInFlight = 8;  // 16-byte loads of a thread, moments in channels_last

// channels_last: how many of a thread's V channels, of its warp's columns and of their rows lie in one group,
// so that they are merged in registers; and where the moments that remain stand in shared memory: [row,
// item], `each` items of a row in a group.
struct Fold {
  uint32_t log_channels = 0, log_columns = 0, log_rows = 0;
  uint32_t lanes = 0;                // the bits in which merged lanes differ
  uint32_t in_row = 0, plane = 0;    // vectors of a row; places from an item of a vector to the next
  uint32_t log_items = 0, each = 0;  // items of a vector, of a row in a group
  Divide by_each;

  Fold() = default;
  Fold(uint32_t slice, uint32_t width, uint32_t vector, uint32_t rows_of_block) {
    const uint32_t count = slice / vector;
    while (vector >> log_channels > 1 && width % (2u << log_channels) == 0) ++log_channels;
    while (vector >> log_channels == 1 && log_columns < 5 && width / vector % (2u << log_columns) == 0)
      ++log_columns;
    while (count << log_rows < 32) ++log_rows;
    if (count << log_rows != 32) log_rows = 0;
    lanes = ((1u << log_columns) - 1) | (32 - (32 >> log_rows));
    in_row = count >> log_columns;
    plane = (rows_of_block >> log_rows) * in_row + 1;  // one more, to keep the readers of a group apart
    while (vector >> log_channels >> log_items > 1) ++log_items;
    each = width >> log_channels >> log_columns;
    by_each = Divide(each);
  }
  int64_t places() const { return int64_t{plane} << log_items; }
  __device__ __forceinline__ uint32_t place(uint32_t row, uint32_t item) const {
    return (item & ((1u << log_items) - 1)) * plane + row * in_row + (item >> log_items);
  }

  // Sum over the merged lanes.
  __device__ __forceinline__ float sum(float x) const {
#pragma unroll
    for (uint32_t mask = 1; mask < 32; mask *= 2)
      if (lanes & mask) x += __shfl_xor_sync(0xffffffffu, x, static_cast<int>(mask));
    return x;
  }
  // Moments of the first channel of each item become the item's, in all merged lanes.
  template <int V>
  __device__ __forceinline__ void merge(Running<V>& of) const {
#pragma unroll
    for (int step = 1; step < V; step *= 2) {
      if (step >> log_channels) continue;
#pragma unroll
      for (int v = 0; v < V; v += 2 * step) {
        const float half = 0.5f * (of.mean[v + step] - of.mean[v]);
        of.mean[v] += half;
        of.m2[v] += of.m2[v + step] + 2.0f * of.count * (half * half);
      }
      of.count *= 2.0f;
    }
    if (lanes == 0) return;
    const float total = sum(of.count), share = of.count / total;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v & ((1 << log_channels) - 1)) continue;
      const float mean = sum(share * of.mean[v]), delta = of.mean[v] - mean;
      of.m2[v] = sum(of.m2[v] + of.count * (delta * delta));
      of.mean[v] = mean;
    }
  }
};

struct Arguments {
  const void *h, *h2, *residual;
  void *out, *s;
  Vector weight, bias, shift;
  float *mean, *rstd;
  float2* scratch;  // moments: [sample, group, part]
  float eps;
  bool silu;
  Sizes sizes;
  Cut cut;
  Fold fold;
  int64_t first_sample;
  // shared memory
  uint32_t data, partial, parameters, received, stat;
};

// shift, weight and bias of a slice's channels, then (after the statistics) what apply needs of them
struct Parameters {
  float *shift, *weight, *bias;

  __device__ __forceinline__ Parameters(const Arguments& a) {
    shift = shared_at<float>(a.parameters);
    weight = shift + a.cut.slice;
    bias = weight + a.cut.slice;
  }
  __device__ __forceinline__ void load(const Arguments& a, const Block& block) const {
    for (uint32_t i = threadIdx.x; i < a.cut.slice; i += kThreads) {
      const uint32_t c = block.slice * a.cut.slice + i;
      // the residual sum has the shift in it already
      shift[i] = a.shift && !a.residual ? read(a.shift, block.b * a.sizes.channels + c) : 0.0f;
      weight[i] = read(a.weight, c);
      bias[i] = read(a.bias, c);
    }
  }
};

// s = h + shift + residual, rounded to T, stored and put in h's place.
template <class T, int V>
__device__ __forceinline__ void add_residual(const Arguments& a, Vec<T, V>& h, const Vec<T, V>& residual,
                                             const float (&shift)[V], int64_t at) {
  float x[V], r[V];
  h.floats(x);
  residual.floats(r);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = (x[i] + shift[i]) + r[i];
  h = Vec<T, V>::of(x);
  h.store(static_cast<T*>(a.s) + at);
}

template <class T, int V>
__device__ __forceinline__ Vec<T, V> normalize(const Arguments& a, const Vec<T, V>& raw,
                                               const float (&mean)[V], const float (&scale)[V],
                                               const float (&bias)[V]) {
  float x[V];
  raw.floats(x);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = (x[i] - mean[i]) * scale[i] + bias[i];
    if (a.silu) x[i] *= sigmoid<T>(x[i]);
  }
  return Vec<T, V>::of(x);
}

// ---- channels_last

// Moments of the block's part, by group; one: for one_kernel, which keeps the part in shared memory and whose
// cluster must have started before f, which gets f(group of the slice, lane of the team, lanes, mean and M2).
template <class T, int V, bool one, class F>
__device__ __forceinline__ void nhwc_moments(const Arguments& a, const Block& block, F&& f) {
  using Elements = Vec<T, V>;
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
  float2* partial = shared_at<float2>(a.partial);
  const Columns<V> columns(a.cut.slice);
  const Fold& fold = a.fold;
  const Parameters parameters(a);

  for (uint32_t first = 0; first < columns.count; first += columns.step) {
    const bool idle = first + columns.column >= columns.count;
    const uint32_t column = idle ? columns.count - 1 : first + columns.column, end = idle ? 0 : length;
    const uint32_t c = block.slice * a.cut.slice + column * V;
    uint32_t stride;
    const T* h = pair.nhwc(a.sizes, block.b, begin, c, stride);
    const int64_t whole =
        (block.b * a.sizes.pixels + begin) * a.sizes.channels + c;  // in a tensor with all channels
    float shift[V] = {};
    if (a.residual && a.shift) {
#pragma unroll
      for (int v = 0; v < V; ++v) shift[v] = read(a.shift, block.b * a.sizes.channels + c + v);
    }
    Running<V> running;
    const int64_t step = int64_t{columns.rows} * stride;
    const T* at = h + int64_t{columns.row} * stride;
    for (uint32_t p = columns.row; p < end; p += kInFlight * columns.rows, at += kInFlight * step) {
      const auto some = [&](auto every) {
        constexpr bool all = decltype(every)::value;
        const int n = all ? kInFlight : static_cast<int>((end - p - 1) / columns.rows + 1);
        Elements x[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
          if (all || k < n) x[k] = Elements::load_constant(at + k * step);
        if (a.residual) {
          const T* residual = static_cast<const T*>(a.residual) + whole;
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            if (!all && k >= n) continue;
            const int64_t pixel = static_cast<int64_t>(p + k * columns.rows) * a.sizes.channels;
            add_residual(a, x[k], Elements::load_constant(residual + pixel), shift, whole + pixel);
          }
        }
        if (one) {
          T* data = shared_at<T>(a.data) + p * a.cut.slice + column * V;
#pragma unroll
          for (int k = 0; k < kInFlight; ++k)
            if (all || k < n) x[k].keep(data + k * columns.rows * a.cut.slice);
        }
        running.template add_some<all, kInFlight>(n, [&](int k, int v) { return x[k].at(v); });
      };
      if (p + (kInFlight - 1) * columns.rows < end)
        some(std::true_type{});
      else
        some(std::false_type{});
    }
    if (first == 0) parameters.load(a, block);
    __syncthreads();
#pragma unroll
    for (int v = 0; v < V; ++v)
      running.mean[v] += parameters.shift[column * V + v];  // it only moves the mean
    fold.merge(running);
    if (idle || threadIdx.x & fold.lanes) continue;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if ((v & ((1 << fold.log_channels) - 1)) == 0)
        partial[(v >> fold.log_channels) * fold.plane + (columns.row >> fold.log_rows) * fold.in_row +
                (column >> fold.log_columns)] = make_float2(running.mean[v], running.m2[v]);
  }
  __syncthreads();
  if (one) cluster_wait();

  const uint32_t groups = a.cut.slice / a.sizes.width, folded = 1u << fold.log_rows;
  const uint32_t rows = (min(columns.rows, length) + folded - 1) >> fold.log_rows;
  const uint32_t full = length / columns.rows, extra = length - full * columns.rows;  // pixels of a row
  const int lanes = team_for(groups), teams = kThreads / lanes, team = threadIdx.x / lanes;
  for (uint32_t round = 0; round < groups; round += teams) {
    const uint32_t group = min(round + team, groups - 1);  // a team with none repeats the last
    const float2 moments =
        merge(rows * fold.each, static_cast<float>(length) * a.sizes.width, lanes,
              [&](uint32_t i, float& n, float& mean, float& m2) {
                const uint32_t row = fold.by_each.quotient(i), first = row << fold.log_rows;
                const float2 of = partial[fold.place(row, group * fold.each + i - row * fold.each)];
                const uint32_t longer = extra > first ? min(extra - first, folded) : 0;
                n = static_cast<float>((folded * full + longer) << (fold.log_channels + fold.log_columns));
                mean = of.x;
                m2 = of.y;
              });
    f(group, threadIdx.x % lanes, lanes, moments);
  }
}

// The block's part, from `source` (element 0: the part's first pixel, first channel of the slice; `pixel`
// elements between pixels); stat holds mean and 1/std of the slice's groups.
template <class T, int V>
__device__ __forceinline__ void nhwc_apply(const Arguments& a, const Block& block, bool kept) {
  using Elements = Vec<T, V>;
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const float2* stat = shared_at<float2>(a.stat);
  const Parameters parameters(a);
  const Columns<V> columns(a.cut.slice);
  const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};

  for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
    float mean[V], scale[V], bias[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const uint32_t i = column * V + v;
      const float2 of = stat[a.sizes.by_width.quotient(i)];
      mean[v] = of.x - parameters.shift[i];
      scale[v] = of.y * parameters.weight[i];
      bias[v] = parameters.bias[i];
    }
    const uint32_t c = block.slice * a.cut.slice + column * V;
    const int64_t whole = (block.b * a.sizes.pixels + begin) * a.sizes.channels + c;
    T* out = static_cast<T*>(a.out) + whole;
    const T* source;
    uint32_t stride;
    if (kept) {
      source = shared_at<T>(a.data) + column * V;
      stride = a.cut.slice;
    } else if (a.residual) {
      source = static_cast<const T*>(a.s) + whole;
      stride = a.sizes.channels;
    } else {
      source = pair.nhwc(a.sizes, block.b, begin, c, stride);
    }
    constexpr int kAtOnce = 4;
    for (uint32_t p = columns.row; p < length; p += kAtOnce * columns.rows) {
      Elements x[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (p + k * columns.rows < length)
          x[k] = Elements::load(source + static_cast<int64_t>(p + k * columns.rows) * stride);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (p + k * columns.rows < length)
          normalize(a, x[k], mean, scale, bias)
              .store(out + static_cast<int64_t>(p + k * columns.rows) * a.sizes.channels);
    }
  }
}

// ---- NCHW: a group's channels lie side by side; vectors counted through the group

template <class T, int V>
struct Group {
  const Arguments& a;
  const Block& block;
  Pair<T> pair;
  int64_t whole;  // of the group in a tensor with all channels
  uint32_t c0;

  __device__ __forceinline__ Group(const Arguments& a_, const Block& block_)
      : a(a_), block(block_), pair{static_cast<const T*>(a_.h), static_cast<const T*>(a_.h2)} {
    c0 = block.slice * a.sizes.width;
    whole = (block.b * a.sizes.channels + c0) * a.sizes.pixels;
  }
  __device__ __forceinline__ uint32_t channel(uint32_t i) const { return a.sizes.by_row.quotient(i); }
  __device__ __forceinline__ const T* h(uint32_t i) const {
    const uint32_t c = channel(i);
    return pair.nchw(a.sizes, block.b, c0 + c) + (i - c * a.sizes.by_row.divisor) * V;
  }
};

// Moments of the block's part, the same in every thread.
template <class T, int V, bool one>
__device__ __forceinline__ float2 nchw_moments(const Arguments& a, const Block& block) {
  using Elements = Vec<T, V>;
  constexpr int K = 4;
  const Group<T, V> group(a, block);
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  Running<1> running;
  for (uint32_t p = threadIdx.x; p < length; p += K * kThreads) {
    Elements x[K] = {};
    float shift[K] = {};
    const int n = static_cast<int>(min(static_cast<uint32_t>(K), (length - p - 1) / kThreads + 1));
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (k < n) x[k] = Elements::load_constant(group.h(begin + p + k * kThreads));
    if (a.shift) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < n)
          shift[k] =
              read(a.shift, block.b * a.sizes.channels + group.c0 + group.channel(begin + p + k * kThreads));
    }
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + group.whole;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k >= n) continue;
        const int64_t at = static_cast<int64_t>(begin + p + k * kThreads) * V;
        float shifts[V];
#pragma unroll
        for (int v = 0; v < V; ++v) shifts[v] = shift[k];
        add_residual(a, x[k], Elements::load_constant(residual + at), shifts, group.whole + at);
        shift[k] = 0.0f;
      }
    }
    if (one) {
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < n) x[k].keep(shared_at<T>(a.data) + (p + k * kThreads) * V);
    }
    running.template add<K * V>(n * V, [&](int i, int) { return x[i / V].at(i % V) + shift[i / V]; });
  }
  Parameters(a).load(a, block);
  float* shared = shared_at<float>(a.partial);
  const float mean = block_sum(running.count * running.mean[0], shared) / (static_cast<float>(length) * V);
  const float delta = running.mean[0] - mean;
  const float m2 = block_sum(running.m2[0] + running.count * (delta * delta), shared + kWarps);
  if (one) cluster_wait();
  return make_float2(mean, m2);
}

template <class T, int V>
__device__ __forceinline__ void nchw_apply(const Arguments& a, const Block& block, bool kept) {
  using Elements = Vec<T, V>;
  constexpr int K = 4;
  const Group<T, V> group(a, block);
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const float2 stat = *shared_at<float2>(a.stat);
  const Parameters parameters(a);
  for (uint32_t p = threadIdx.x; p < length; p += K * kThreads) {
    Elements x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const uint32_t i = begin + p + k * kThreads;
      if (p + k * kThreads >= length) continue;
      if (kept)
        x[k] = Elements::load(shared_at<T>(a.data) + (p + k * kThreads) * V);
      else
        x[k] = Elements::load(
            a.residual ? static_cast<const T*>(a.s) + group.whole + static_cast<int64_t>(i) * V : group.h(i));
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const uint32_t i = begin + p + k * kThreads;
      if (p + k * kThreads >= length) continue;
      const uint32_t c = group.channel(i);
      float mean[V], scale[V], bias[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        mean[v] = stat.x - parameters.shift[c];
        scale[v] = stat.y * parameters.weight[c];
        bias[v] = parameters.bias[c];
      }
      normalize(a, x[k], mean, scale, bias)
          .store(static_cast<T*>(a.out) + group.whole + static_cast<int64_t>(i) * V);
    }
  }
}

// ---- both layouts

// Mean and 1/std of the slice's groups into shared memory, from the parts' moments; a barrier follows.
template <int V, bool nhwc, class Source>
__device__ __forceinline__ void merge_parts(const Arguments& a, const Block& block, Source&& source) {
  const uint32_t groups = a.cut.slice / a.sizes.width;
  const float each = nhwc ? a.sizes.width : V;  // elements of a group in a unit of length
  for (uint32_t round = 0; round < groups; round += kWarps) {
    const uint32_t group = min(round + threadIdx.x / 32, groups - 1);
    const float total = a.cut.total * each;
    const float2 moments =
        merge(a.cut.parts, total, 32, [&](uint32_t part, float& n, float& mean, float& m2) {
          const float2 of = source(group, part);
          n = a.cut.length(part) * each;
          mean = of.x;
          m2 = of.y;
        });
    if (threadIdx.x % 32 != 0 || round + threadIdx.x / 32 >= groups) continue;
    const float2 of = make_float2(moments.x, 1.0f / sqrtf(moments.y / total + a.eps));
    shared_at<float2>(a.stat)[group] = of;
    if (block.part == 0) {
      const int64_t i = block.b * a.sizes.groups + block.slice * groups + group;
      a.mean[i] = of.x;
      a.rstd[i] = of.y;
    }
  }
  __syncthreads();
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, 2) one_kernel(const Arguments a) {
  cluster_arrive_relaxed();  // a peer's shared memory is there once the peer has started
  const Block block(a.cut, a.first_sample);
  const uint32_t groups = a.cut.slice / a.sizes.width;
  float2* received = shared_at<float2>(a.received);  // [part, group]
  if constexpr (nhwc) {
    nhwc_moments<T, V, true>(a, block, [&](uint32_t group, int lane, int lanes, float2 moments) {
      for (uint32_t peer = lane; peer < a.cut.parts; peer += lanes)
        cluster_peer(received, peer)[block.part * groups + group] = moments;
    });
  } else {
    const float2 moments = nchw_moments<T, V, true>(a, block);
    if (threadIdx.x < a.cut.parts) cluster_peer(received, threadIdx.x)[block.part] = moments;
  }
  cluster_arrive();
  cluster_wait();
  merge_parts<V, nhwc>(a, block,
                       [&](uint32_t group, uint32_t part) { return received[part * groups + group]; });
  if constexpr (nhwc)
    nhwc_apply<T, V>(a, block, true);
  else
    nchw_apply<T, V>(a, block, true);
}

// Where a slice's moments start in the scratch memory.
__device__ __forceinline__ float2* scratch_of(const Arguments& a, const Block& block, uint32_t group) {
  const int64_t g = block.b * a.sizes.groups + block.slice * (a.cut.slice / a.sizes.width) + group;
  return a.scratch + g * a.cut.parts;
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, 2) moments_kernel(const Arguments a) {
  const Block block(a.cut, a.first_sample);
  if constexpr (nhwc) {
    nhwc_moments<T, V, false>(a, block, [&](uint32_t group, int lane, int, float2 moments) {
      if (lane == 0) scratch_of(a, block, group)[block.part] = moments;
    });
  } else {
    const float2 moments = nchw_moments<T, V, false>(a, block);
    if (threadIdx.x == 0) scratch_of(a, block, 0)[block.part] = moments;
  }
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(const Arguments a) {
  const Block block(a.cut, a.first_sample);
  Parameters(a).load(a, block);
  merge_parts<V, nhwc>(a, block,
                       [&](uint32_t group, uint32_t part) { return scratch_of(a, block, group)[part]; });
  if constexpr (nhwc)
    nhwc_apply<T, V>(a, block, false);
  else
    nchw_apply<T, V>(a, block, false);
}

// ---- how the work is cut

template <class T, int V, bool nhwc>
struct Plan {
  const Sizes& s;

  // vectors of a group, or pixels; bytes of each
  uint32_t total() const { return nhwc ? s.pixels : s.width * (s.pixels / V); }
  int64_t bytes(uint32_t slice) const { return int64_t{nhwc ? slice : V} * sizeof(T); }

  static int64_t lay_out(Arguments& a, bool one) {
    Layout layout;
    const uint32_t slice = a.cut.slice, groups = slice / a.sizes.width;
    if (one) a.data = layout.add(a.cut.size * Plan{a.sizes}.bytes(slice));
    if (nhwc) a.fold = Fold(slice, a.sizes.width, V, Columns<V>::rows_of(slice));
    a.partial = layout.add(nhwc ? a.fold.places() * sizeof(float2) : 2 * kWarps * sizeof(float));
    a.parameters = layout.add(int64_t{3} * slice * sizeof(float));
    if (one) a.received = layout.add(int64_t{a.cut.parts} * groups * sizeof(float2));
    a.stat = layout.add(groups * sizeof(float2));
    return layout.bytes;
  }

  // Whether a cluster can hold a slice; then it is done.
  static bool run_one(const char* op, Arguments& a, int64_t batch, const Exec& exec) {
    const Plan plan{a.sizes};
    const auto kernel = one_kernel<T, V, nhwc>;
    for (const Room& room : kRooms) {
      a.cut = cluster_cut<nhwc>(
          a.sizes, batch, V, sizeof(T), plan.total(), [&](uint32_t slice) { return plan.bytes(slice); }, room,
          widest_cluster(kernel, kThreads, room.shared, exec.device), exec.device);
      if (a.cut.parts == 0) continue;
      const int64_t shared = lay_out(a, true);
      if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device)) continue;
      launch(
          op, kernel,
          {batch * a.cut.slices * a.cut.parts, kThreads, shared, static_cast<int>(a.cut.parts), exec.stream},
          a);
      return true;
    }
    return false;
  }

  static void run(const char* op, Arguments a, int64_t batch, const Exec& exec) {
    if (run_one(op, a, batch, exec)) return;
    const Plan plan{a.sizes};
    check_scratch(op, exec);
    a.cut = chunk_cut<nhwc>(a.sizes, V, sizeof(T), plan.total(),
                            [&](uint32_t slice) { return plan.bytes(slice); });
    const int64_t shared = lay_out(a, false);
    check_shared(op, a.cut, shared, exec.device);
    each_chunk(batch, int64_t{a.sizes.channels} * a.sizes.pixels * sizeof(T), exec.device,
               [&](int64_t first, int64_t samples) {
                 a.first_sample = first;
                 const Launch blocks{samples * a.cut.slices * a.cut.parts, kThreads, shared, 1, exec.stream};
                 launch(op, moments_kernel<T, V, nhwc>, blocks, a);
                 launch(op, apply_kernel<T, V, nhwc>, blocks, a);
               });
  }
};

}  // namespace

void group_norm_silu(Tensor out, Tensor s, float* mean, float* rstd, const Norm& norm, Exec exec) {
  if (out.numel() == 0) return;
  const char* op = norm.residual ? "add_group_norm_silu" : "group_norm_silu";
  const OnDevice on(exec.device);
  const bool vectors = vectors_fit(norm, {out.data, s.data});
  with_type(norm.h.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    Arguments a{norm.h.data,
                norm.h2.data,
                norm.residual.data,
                out.data,
                s.data,
                norm.weight,
                norm.bias,
                norm.shift,
                mean,
                rstd,
                static_cast<float2*>(exec.scratch),
                static_cast<float>(norm.eps),
                norm.silu,
                Sizes(norm, vectors ? V : 1),
                {},
                {},
                0,
                0,
                0,
                0,
                0,
                0};
    const int64_t batch = norm.h.size[0];
    if (norm.h.channels_last())
      vectors ? Plan<T, V, true>::run(op, a, batch, exec) : Plan<T, 1, true>::run(op, a, batch, exec);
    else
      vectors ? Plan<T, V, false>::run(op, a, batch, exec) : Plan<T, 1, false>::run(op, a, batch, exec);
  });
}

}  // namespace sr3fast::cuda
