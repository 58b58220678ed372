// group_norm_silu, forward.
//
// Where the blocks that run at once have room for a slice in shared memory, one kernel reads it once:
// moments, an exchange between the blocks, and the result from shared memory. The blocks of small tensors are
// clusters; those of large ones tell each other through global memory and go from slice to slice, the next
// part on its way into the place of what was applied. Otherwise two kernels, moments and apply, over as many
// samples at a time as stay in the L2 cache from one to the other.
#include "norm.cuh"

namespace sr3fast::cuda {
namespace {

constexpr int kInFlight = 4;  // 16-byte loads of a thread, moments in channels_last

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
  uint32_t units;  // parts of all slices
  Fold fold;
  int64_t first_sample;
  // shared memory
  uint32_t data, partial, parameters, received, stat;
};

// What a block needs of its slice's channels, in shared memory: the shift, while moments are taken, and what
// apply needs.
struct Parameters {
  float *shift, *weight, *bias;

  __device__ __forceinline__ explicit Parameters(const Arguments& a) {
    shift = shared_at<float>(a.parameters);
    weight = shift + a.cut.slice;
    bias = weight + a.cut.slice;
  }
};

// A channel's shift (the residual sum has it in it already), weight and bias.
struct Fetched {
  float shift = 0.0f, weight, bias;

  Fetched() = default;
  __device__ __forceinline__ Fetched(const Arguments& a, const Block& block, uint32_t i) {
    const uint32_t c = block.slice * a.cut.slice + i;
    if (a.shift && !a.residual) shift = read(a.shift, block.b * a.sizes.channels + c);
    weight = read(a.weight, c);
    bias = read(a.bias, c);
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

// act(weight (x - mean) / std + bias) of a channel. To a half's rounding one product does; a float's would
// lose what a large mean leaves.
template <class T, bool silu>
struct Affine {
  using Act = Activation<T, silu>;
  float mean, scale, bias;

  // of what lies in shared memory
  Affine() = default;
  __device__ __forceinline__ Affine(const Parameters& p, uint32_t i)
      : mean(sizeof(T) == 2 ? 0.0f : p.shift[i]), scale(p.weight[i]), bias(p.bias[i]) {}

  static __device__ __forceinline__ void put(const Parameters& p, uint32_t i, const Fetched& of,
                                             float2 stat) {
    const float mean = stat.x - of.shift, scale = stat.y * of.weight * Act::half, bias = of.bias * Act::half;
    p.shift[i] = mean;
    p.weight[i] = scale;
    p.bias[i] = sizeof(T) == 2 ? bias - mean * scale : bias;
  }
  __device__ __forceinline__ float operator()(float x) const {
    return Act::of(sizeof(T) == 2 ? x * scale + bias : (x - mean) * scale + bias);
  }
};

// ---- channels_last

// A block's part of h, and then of the residual, into shared memory: a thread copies what it alone reads.
template <class T, int V>
__device__ __forceinline__ void nhwc_copy(const Arguments& a, const Block& block, T* data) {
  const Columns<V> columns(a.cut);
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
  for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
    const uint32_t c = block.slice * a.cut.slice + column * V;
    uint32_t stride;
    const T* h = pair.nhwc(a.sizes, block.b, begin, c, stride);
    T* to = data + column * V;
    for (uint32_t p = columns.row; p < length; p += columns.rows)
      Vec<T, V>::copy(to + p * a.cut.slice, h + int64_t{p} * stride);
    if (!a.residual) continue;
    const T* residual =
        static_cast<const T*>(a.residual) + (block.b * a.sizes.pixels + begin) * a.sizes.channels + c;
    to += a.cut.size * a.cut.slice;
    for (uint32_t p = columns.row; p < length; p += columns.rows)
      Vec<T, V>::copy(to + p * a.cut.slice, residual + int64_t{p} * a.sizes.channels);
  }
}

// Moments of the block's part, by group: f(group of the slice, lane of the team, lanes, mean and M2). one:
// the part is on its way into shared memory. A cluster must have started before f.
template <class T, int V, bool one, bool cluster, class F>
__device__ __forceinline__ void nhwc_moments(const Arguments& a, const Block& block, T* data, F&& f) {
  using Elements = Vec<T, V>;
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
  float2* partial = shared_at<float2>(a.partial);
  const Columns<V> columns(a.cut);
  const Fold& fold = a.fold;
  const Parameters parameters(a);
  const bool shifted = a.shift && !a.residual;
  const Fetched fetched = shifted ? fetch<Fetched>(a, block) : Fetched{};

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
    if constexpr (one) {
      wait_for_copies();
      T* kept = data + columns.row * a.cut.slice + column * V;
      const uint32_t step = columns.rows * a.cut.slice;
      const uint32_t n = end > columns.row ? a.cut.by_rows.quotient(end - columns.row + columns.rows - 1) : 0;
      if (a.residual) {
        const T* residual = kept + a.cut.size * a.cut.slice;
        int64_t at = whole + int64_t{columns.row} * a.sizes.channels;
        for (uint32_t i = 0; i < n; ++i, at += int64_t{columns.rows} * a.sizes.channels) {
          Elements x = Elements::load(kept + i * step);
          add_residual(a, x, Elements::load(residual + i * step), shift, at);
          x.keep(kept + i * step);
        }
      }
      running.of(n, [&](uint32_t i) { return Elements::load(kept + i * step); });
    } else {
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
          running.template add_some<all, kInFlight>(n, [&](int k, int v) { return x[k].at(v); });
        };
        if (p + (kInFlight - 1) * columns.rows < end)
          some(std::true_type{});
        else
          some(std::false_type{});
      }
    }
    if (shifted) {
      if (first == 0)
        each_channel(a, block, fetched,
                     [&](uint32_t i, const Fetched& of) { parameters.shift[i] = of.shift; });
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v)
        running.mean[v] += parameters.shift[column * V + v];  // it only moves the mean
    }
    fold.merge(running);
    if (idle || threadIdx.x & fold.lanes) continue;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if ((v & ((1 << fold.log_channels) - 1)) == 0)
        partial[(v >> fold.log_channels) * fold.plane + (columns.row >> fold.log_rows) * fold.in_row +
                (column >> fold.log_columns)] = make_float2(running.mean[v], running.m2[v]);
  }
  __syncthreads();
  if (cluster) cluster_wait();

  const uint32_t groups = a.cut.slice / a.sizes.width, folded = 1u << fold.log_rows;
  const uint32_t rows = (min(columns.rows, length) + folded - 1) >> fold.log_rows;
  const uint32_t full = a.cut.by_rows.quotient(length),
                 extra = length - full * columns.rows;  // pixels of a row
  by_teams(groups, [&](uint32_t group, int lane, int lanes, bool) {
    const float2 moments =
        merge(rows * fold.each, static_cast<float>(length) * a.sizes.width, lane, lanes,
              [&](uint32_t i, float& n, float& mean, float& m2) {
                const uint32_t row = fold.by_each.quotient(i), first = row << fold.log_rows;
                const float2 of = partial[fold.place(row, group * fold.each + i - row * fold.each)];
                const uint32_t longer = extra > first ? min(extra - first, folded) : 0;
                n = static_cast<float>((folded * full + longer) << (fold.log_channels + fold.log_columns));
                mean = of.x;
                m2 = of.y;
              });
    f(group, lane, lanes, moments);
  });
}

// The block's part, from shared memory where it is kept: then the place of each vector that was read is for
// the same of `next`, where more is to come.
template <class T, int V, bool kept, bool silu>
__device__ __forceinline__ void nhwc_apply(const Arguments& a, const Block& block, T* kept_data, bool more,
                                           const Block& next) {
  using Elements = Vec<T, V>;
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const Parameters parameters(a);
  const Columns<V> columns(a.cut);
  const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};

  for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
    Affine<T, silu> affine[V];
#pragma unroll
    for (int v = 0; v < V; ++v) affine[v] = Affine<T, silu>(parameters, column * V + v);
    const uint32_t c = block.slice * a.cut.slice + column * V;
    const int64_t whole = (block.b * a.sizes.pixels + begin) * a.sizes.channels + c;
    T* out = static_cast<T*>(a.out) + whole + int64_t{columns.row} * a.sizes.channels;
    const int64_t out_step = int64_t{columns.rows} * a.sizes.channels;
    T* data = kept_data + columns.row * a.cut.slice + column * V;
    const uint32_t step = columns.rows * a.cut.slice;
    const T* source = nullptr;
    uint32_t stride = 0, next_length = 0;
    if (!kept && a.residual) {
      source = static_cast<const T*>(a.s) + whole;
      stride = a.sizes.channels;
    } else if (!kept) {
      source = pair.nhwc(a.sizes, block.b, begin, c, stride);
    } else if (more && !a.residual) {
      next_length = a.cut.length(next.part);
      source =
          pair.nhwc(a.sizes, next.b, a.cut.begin(next.part), next.slice * a.cut.slice + column * V, stride);
    }
    source += int64_t{columns.row} * stride;
    const int64_t source_step = int64_t{columns.rows} * stride;

    constexpr int K = 4;
    uint32_t p = columns.row;
    const auto some = [&](auto every) {
      constexpr bool all = decltype(every)::value;
      Elements x[K];
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (all || p + k * columns.rows < length)
          x[k] = Elements::load(kept ? data + k * step : source + k * source_step);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (!all && p + k * columns.rows >= length) continue;
        float y[V];
#pragma unroll
        for (int v = 0; v < V; ++v) y[v] = affine[v](x[k].at(v));
        Elements::of(y).store(out + k * out_step);
      }
      if constexpr (kept) {
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (p + k * columns.rows < next_length) Elements::copy(data + k * step, source + k * source_step);
      }
      p += K * columns.rows;
      out += K * out_step;
      data += K * step;
      source += K * source_step;
    };
    while (p + (K - 1) * columns.rows < length) some(std::true_type{});
    if (p < length) some(std::false_type{});
    if constexpr (kept) {  // a longer next part
      for (; p < next_length; p += columns.rows, data += step, source += source_step)
        Elements::copy(data, source);
    }
  }
  if (kept && more && a.residual) nhwc_copy<T, V>(a, next, kept_data);
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

template <class T, int V>
__device__ __forceinline__ void nchw_copy(const Arguments& a, const Block& block, T* data) {
  const Group<T, V> group(a, block);
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  for (uint32_t p = threadIdx.x; p < length; p += kThreads) {
    Vec<T, V>::copy(data + p * V, group.h(begin + p));
    if (a.residual)
      Vec<T, V>::copy(data + (a.cut.size + p) * V,
                      static_cast<const T*>(a.residual) + group.whole + static_cast<int64_t>(begin + p) * V);
  }
}

// Moments of the block's part, the same in every thread.
template <class T, int V, bool one, bool cluster>
__device__ __forceinline__ float2 nchw_moments(const Arguments& a, const Block& block, T* data) {
  using Elements = Vec<T, V>;
  constexpr int K = 4;
  const Group<T, V> group(a, block);
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  if (one) wait_for_copies();
  Running<1> running;
  for (uint32_t p = threadIdx.x; p < length; p += K * kThreads) {
    Elements x[K] = {};
    float shift[K] = {};
    const int n = static_cast<int>(min(static_cast<uint32_t>(K), (length - p - 1) / kThreads + 1));
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (k < n)
        x[k] = one ? Elements::load(data + (p + k * kThreads) * V)
                   : Elements::load_constant(group.h(begin + p + k * kThreads));
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
        const uint32_t i = p + k * kThreads;
        const int64_t at = static_cast<int64_t>(begin + i) * V;
        float shifts[V];
#pragma unroll
        for (int v = 0; v < V; ++v) shifts[v] = shift[k];
        add_residual(
            a, x[k],
            one ? Elements::load(data + (a.cut.size + i) * V) : Elements::load_constant(residual + at),
            shifts, group.whole + at);
        shift[k] = 0.0f;
        if (one) x[k].keep(data + i * V);
      }
    }
    running.template add<K * V>(n * V, [&](int i, int) { return x[i / V].at(i % V) + shift[i / V]; });
  }
  float* shared = shared_at<float>(a.partial);
  const float mean = block_sum(running.count * running.mean[0], shared) / (static_cast<float>(length) * V);
  const float delta = running.mean[0] - mean;
  const float m2 = block_sum(running.m2[0] + running.count * (delta * delta), shared + kWarps);
  if (cluster) cluster_wait();
  return make_float2(mean, m2);
}

template <class T, int V, bool kept, bool silu>
__device__ __forceinline__ void nchw_apply(const Arguments& a, const Block& block, T* data, bool more,
                                           const Block& next) {
  using Elements = Vec<T, V>;
  constexpr int K = 4;
  const Group<T, V> group(a, block);
  const uint32_t begin = a.cut.begin(block.part), length = a.cut.length(block.part);
  const Parameters parameters(a);
  for (uint32_t p = threadIdx.x; p < length; p += K * kThreads) {
    Elements x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const uint32_t i = begin + p + k * kThreads;
      if (p + k * kThreads >= length) continue;
      if (kept)
        x[k] = Elements::load(data + (p + k * kThreads) * V);
      else
        x[k] = Elements::load(
            a.residual ? static_cast<const T*>(a.s) + group.whole + static_cast<int64_t>(i) * V : group.h(i));
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const uint32_t i = begin + p + k * kThreads;
      if (p + k * kThreads >= length) continue;
      const Affine<T, silu> affine(parameters, group.channel(i));
      float y[V];
#pragma unroll
      for (int v = 0; v < V; ++v) y[v] = affine(x[k].at(v));
      Elements::of(y).store(static_cast<T*>(a.out) + group.whole + static_cast<int64_t>(i) * V);
    }
  }
  if (kept && more) nchw_copy<T, V>(a, next, data);
}

// ---- both layouts

// Where a slice's groups start in mean and rstd, and its moments in the scratch memory: [group, part].
__device__ __forceinline__ int64_t groups_of(const Arguments& a, const Block& block) {
  return block.b * a.sizes.groups + block.slice * (a.cut.slice / a.sizes.width);
}
__device__ __forceinline__ float2* scratch_of(const Arguments& a, const Block& block) {
  return a.scratch + groups_of(a, block) * a.cut.parts;
}

// Mean and 1/std of the slice's groups, in shared memory, from the parts' moments: source(group, part). The
// slice's first block leaves them for the backward.
template <int V, bool nhwc, class Source>
__device__ __forceinline__ const float2* merge_parts(const Arguments& a, const Block& block,
                                                     Source&& source) {
  float2* stat = shared_at<float2>(a.stat);
  const uint32_t groups = a.cut.slice / a.sizes.width;
  const float each = nhwc ? a.sizes.width : V;  // elements of a group in a unit of length
  const float total = a.cut.total * each;
  by_teams(groups, [&](uint32_t group, int lane, int lanes, bool own) {
    const float2 moments =
        merge(a.cut.parts, total, lane, lanes, [&](uint32_t part, float& n, float& mean, float& m2) {
          const float2 of = source(group, part);
          n = a.cut.length(part) * each;
          mean = of.x;
          m2 = of.y;
        });
    if (lane != 0 || !own) return;
    stat[group] = make_float2(moments.x, 1.0f / sqrtf(moments.y / total + a.eps));
    if (block.part != 0) return;
    a.mean[groups_of(a, block) + group] = stat[group].x;
    a.rstd[groups_of(a, block) + group] = stat[group].y;
  });
  __syncthreads();
  return stat;
}

template <class T, int V, bool nhwc>
__device__ __forceinline__ void copy(const Arguments& a, const Block& block, T* data) {
  if constexpr (nhwc)
    nhwc_copy<T, V>(a, block, data);
  else
    nchw_copy<T, V>(a, block, data);
}

// tell(group, lane, lanes, moments) for the groups of the block's part.
template <class T, int V, bool nhwc, bool one, bool cluster, class F>
__device__ __forceinline__ void moments(const Arguments& a, const Block& block, T* data, F&& tell) {
  if constexpr (nhwc)
    nhwc_moments<T, V, one, cluster>(a, block, data, tell);
  else
    tell(0, threadIdx.x, kThreads, nchw_moments<T, V, one, cluster>(a, block, data));
}

// The block's part, normalized and activated; stat(group of the slice) gives mean and 1/std.
template <class T, int V, bool nhwc, bool kept, class Stat>
__device__ __forceinline__ void apply(const Arguments& a, const Block& block, const Fetched& fetched,
                                      Stat&& stat, T* data, bool more, const Block& next) {
  with_silu(a.silu, [&](auto silu) {
    const Parameters parameters(a);
    each_channel(a, block, fetched, [&](uint32_t i, const Fetched& of) {
      Affine<T, silu.value>::put(parameters, i, of, stat(a.sizes.by_width.quotient(i)));
    });
    __syncthreads();
    if constexpr (nhwc)
      nhwc_apply<T, V, kept, silu.value>(a, block, data, more, next);
    else
      nchw_apply<T, V, kept, silu.value>(a, block, data, more, next);
  });
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, 2) cluster_kernel(const Arguments a) {
  cluster_arrive_relaxed();  // a peer's shared memory is there once the peer has started
  const Block block(a.cut, blockIdx.x, a.first_sample);
  T* data = shared_at<T>(a.data);
  const Fetched fetched = fetch<Fetched>(a, block);
  copy<T, V, nhwc>(a, block, data);
  const uint32_t parts = a.cut.parts;
  float2* received = shared_at<float2>(a.received);  // [group, part]
  moments<T, V, nhwc, true, true>(a, block, data,
                                  [&](uint32_t group, uint32_t lane, uint32_t lanes, float2 of) {
                                    for (uint32_t peer = lane; peer < parts; peer += lanes)
                                      cluster_peer(received, peer)[group * parts + block.part] = of;
                                  });
  cluster_arrive();
  cluster_wait();
  const float2* stat = merge_parts<V, nhwc>(
      a, block, [&](uint32_t group, uint32_t part) { return received[group * parts + part]; });
  apply<T, V, nhwc, true>(a, block, fetched, [&](uint32_t group) { return stat[group]; }, data, false, block);
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, kGridBlocks) grid_kernel(const Arguments a) {
  T* data = shared_at<T>(a.data);
  const uint32_t parts = a.cut.parts, items = a.cut.slice / a.sizes.width * parts;
  float2* received = shared_at<float2>(a.received);  // [group, part]
  Block next(a.cut, blockIdx.x, a.first_sample);
  copy<T, V, nhwc>(a, next, data);
  for (uint32_t index = blockIdx.x; index < a.units;) {
    const Block block = next;
    index += gridDim.x;
    const bool more = index < a.units;
    if (more) next = Block(a.cut, index, a.first_sample);
    const Fetched fetched = fetch<Fetched>(a, block);
    float2* scratch = scratch_of(a, block);
    moments<T, V, nhwc, true, false>(a, block, data, [&](uint32_t group, uint32_t lane, uint32_t, float2 of) {
      if (lane == 0) tell(scratch + group * parts + block.part, of);
    });
    constexpr int K = 4;
    for (uint32_t i = threadIdx.x; i < items; i += K * kThreads)
      hear_some<K>(scratch + i, kThreads, (items - i + kThreads - 1) / kThreads,
                   [&](int k, float2 of) { received[i + k * kThreads] = of; });
    __syncthreads();
    const float2* stat = merge_parts<V, nhwc>(
        a, block, [&](uint32_t group, uint32_t part) { return received[group * parts + part]; });
    apply<T, V, nhwc, true>(a, block, fetched, [&](uint32_t group) { return stat[group]; }, data, more, next);
    __syncthreads();  // the next slice's numbers go where this one's are
  }
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, 2) moments_kernel(const Arguments a) {
  const Block block(a.cut, blockIdx.x, a.first_sample);
  float2* scratch = scratch_of(a, block);
  moments<T, V, nhwc, false, false>(a, block, static_cast<T*>(nullptr),
                                    [&](uint32_t group, uint32_t lane, uint32_t, float2 of) {
                                      if (lane == 0) scratch[group * a.cut.parts + block.part] = of;
                                    });
}

template <class T, int V, bool nhwc>
__global__ void __launch_bounds__(kThreads, 3) apply_kernel(const Arguments a) {
  const Block block(a.cut, blockIdx.x, a.first_sample);
  const Fetched fetched = fetch<Fetched>(a, block);
  const float2* scratch = scratch_of(a, block);
  const float2* stat = merge_parts<V, nhwc>(
      a, block, [&](uint32_t group, uint32_t part) { return scratch[group * a.cut.parts + part]; });
  apply<T, V, nhwc, false>(
      a, block, fetched, [&](uint32_t group) { return stat[group]; }, static_cast<T*>(nullptr), false, block);
}

// ---- how the work is cut

template <class T, int V, bool nhwc>
struct Plan {
  const Sizes& s;

  const bool sum;  // of h and a residual, which is kept too

  explicit Plan(const Arguments& a) : s(a.sizes), sum(a.residual != nullptr) {}
  // vectors of a group, or pixels; bytes of each that are kept
  uint32_t total() const { return nhwc ? s.pixels : s.width * (s.pixels / V); }
  int64_t bytes(uint32_t slice) const { return int64_t{nhwc ? slice : V} * sizeof(T) * (sum ? 2 : 1); }

  static int64_t lay_out(Arguments& a, bool kept) {
    Layout layout;
    const uint32_t slice = a.cut.slice, groups = slice / a.sizes.width;
    if (nhwc) lay_columns(a.cut, V);
    if (nhwc) a.fold = Fold(slice, a.sizes.width, V, a.cut.rows);
    if (kept) a.data = layout.add(a.cut.size * Plan(a).bytes(slice));
    a.partial = layout.add(nhwc ? a.fold.places() * sizeof(float2) : 2 * kWarps * sizeof(float));
    a.parameters = layout.add(int64_t{3} * slice * sizeof(float));
    if (kept) a.received = layout.add(int64_t{a.cut.parts} * groups * sizeof(float2));
    a.stat = layout.add(groups * sizeof(float2));
    return layout.bytes;
  }

  // Whether a cluster can hold a slice; then it is done.
  static bool run_clusters(const char* op, Arguments& a, int64_t batch, const Exec& exec) {
    const Plan plan(a);
    const auto kernel = cluster_kernel<T, V, nhwc>;
    for (const Room& room : kRooms) {
      a.cut = cluster_cut<nhwc>(
          a.sizes, batch, V, sizeof(T), plan.total(), [&](uint32_t slice) { return plan.bytes(slice); }, room,
          widest_cluster(kernel, kThreads, room.shared, exec.device), exec.device);
      if (a.cut.parts == 0) continue;
      const int64_t shared = lay_out(a, true), blocks = batch * a.cut.slices * a.cut.parts;
      if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device)) continue;
      launch(op, kernel, {blocks, kThreads, shared, static_cast<int>(a.cut.parts), exec.stream}, a);
      return true;
    }
    return false;
  }

  // Whether blocks that run at once can; then it is done.
  static bool run_grid(const char* op, Arguments& a, int64_t batch, const Exec& exec) {
    const Plan plan(a);
    a.cut = grid_cut<nhwc>(
        a.sizes, batch, V, sizeof(T), plan.total(), [&](uint32_t slice) { return plan.bytes(slice); },
        exec.device);
    if (a.cut.parts == 0) return false;
    const int64_t units = batch * a.cut.slices * a.cut.parts;
    const int64_t shared = lay_out(a, true);
    if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device)) return false;
    if (a.cut.parts == 1) {  // nobody to meet
      launch(op, cluster_kernel<T, V, nhwc>, {units, kThreads, shared, 1, exec.stream}, a);
      return true;
    }
    const auto kernel = grid_kernel<T, V, nhwc>;
    const int64_t at_once = blocks_at_once(kernel, kThreads, shared, exec.device);
    if (a.cut.parts > at_once) return false;
    a.scratch = static_cast<float2*>(exec.scratch);
    clear(op, a.scratch, batch * a.sizes.groups * a.cut.parts, exec.stream);
    a.units = static_cast<uint32_t>(units);
    return launched(op, kernel, {std::min(units, at_once), kThreads, shared, 1, exec.stream, true}, a);
  }

  static void run(const char* op, Arguments a, int64_t batch, const Exec& exec) {
    check_scratch(op, exec);
    const int64_t sample_bytes = int64_t{a.sizes.channels} * a.sizes.pixels * sizeof(T);
    if (meets_in_clusters(batch * sample_bytes, exec.device)
            ? run_clusters(op, a, batch, exec) || run_grid(op, a, batch, exec)
            : run_grid(op, a, batch, exec) || run_clusters(op, a, batch, exec))
      return;
    const Plan plan(a);
    a.cut = chunk_cut<nhwc>(a.sizes, V, sizeof(T), plan.total(),
                            [&](uint32_t slice) { return plan.bytes(slice); });
    a.scratch = static_cast<float2*>(exec.scratch);
    const int64_t shared = lay_out(a, false);
    check_shared(op, a.cut, shared, exec.device);
    each_chunk(batch, sample_bytes, exec.device, [&](int64_t first, int64_t samples) {
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
                nullptr,
                static_cast<float>(norm.eps),
                norm.silu,
                Sizes(norm, vectors ? V : 1),
                {}};
    const int64_t batch = norm.h.size[0];
    if (norm.h.channels_last())
      vectors ? Plan<T, V, true>::run(op, a, batch, exec) : Plan<T, 1, true>::run(op, a, batch, exec);
    else
      vectors ? Plan<T, V, false>::run(op, a, batch, exec) : Plan<T, 1, false>::run(op, a, batch, exec);
  });
}

}  // namespace sr3fast::cuda
