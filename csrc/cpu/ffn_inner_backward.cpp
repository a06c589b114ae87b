// The op `ffn_inner_backward`: the gradients of `ffn_inner`, whose z and a are computed again.
//     da = dropout(dh Ad) + w dsummed_t     dz_up = da act(z)     dz_gate = da z_up act'(z)
//     dgate_out_t = sum_k dz_gate           dh_gate = scale dz_gate Bg
//     dweight = <dsummed_t, a>              dBg = dz_gate^T u_gate     dAd = dh^T dropout(a)
// A thread computes all gradients of its strips in one pass over the tokens. ffn_inner.h describes
// how threads and steps split the work.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "ffn_inner.h"
#include "ffn_inner_grad.h"
#include "ops.h"

namespace moelora {
namespace {

template <class S, class C>
struct InnerBackward {
  const Inner<S, C>& inner;
  const AdapterGrads<S, C>& adapters;
  const Tensor& dsummed;               // [T, F], dense rows
  std::array<const Tensor*, 2> douts;  // dgate_out and dup_out, [T, F]
  std::array<C*, 2> dh_sums;           // of gate and up, [ranges, num_routed, padded(width)]
  C* products;                         // <dsummed_t, a>, [ranges, num_routed]

  // A thread's buffers. Two of a kind belong to gate and up. V is how values enter a product.
  template <class Unit, class V>
  struct Buffers {
    // The right sides of the products u Bt and dh Ad, and dz B: [strips, ranks, STRIP].
    Unit *b_of_ranks[2], *down_of_ranks, *b_of_columns[2];
    Unit* u_units;
    C *z[2], *da, *partial, *product, *dout[2];
    V* values[ADAPTERS];  // dz_gate, dz_up and dropout(a)
    GradSums<C, Unit> sums;
  };

  // Returns how many numbers of C the buffers have, and divides scratch among them unless it is
  // null. strips: of a range.
  template <class Unit, class V>
  int64_t divide(C* scratch, int64_t strips, Buffers<Unit, V>& b) const {
    int64_t size = 0;
    const auto take = [&](auto& pointer, int64_t count) {
      if (scratch) pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(scratch + size);
      size += padded(count);
    };
    const int64_t matrix = inner.ranks * STRIP * strips, w = padded(inner.tensors.width);
    for (int64_t i = 0; i < 2; ++i) {
      take(b.b_of_ranks[i], matrix);
      take(b.b_of_columns[i], matrix);
      take(b.z[i], CHUNK * STRIP);
      take(b.dout[i], inner.token_blocks.size() * STRIP);
    }
    take(b.down_of_ranks, matrix);
    take(b.u_units, CHUNK * w);
    take(b.da, CHUNK * STRIP);
    take(b.partial, CHUNK * STRIP);
    take(b.product, CHUNK * w);
    for (V*& rows : b.values) take(rows, CHUNK * STRIP);
    if (adapters.needed()) {
      for (int64_t i = 0; i < ADAPTERS; ++i) {
        take(b.sums.partial[i], matrix);
        take(b.sums.total[i], matrix);
      }
      take(b.sums.rank_units, CHUNK * w);
      take(b.sums.row_units, CHUNK * STRIP);
    }
    return size;
  }

  // Packs strip `index` of a range.
  template <class P, int BYTES, class B>
  MOELORA_INLINE void pack(int64_t strip, int64_t index, const B& b) const {
    const InnerTensors& t = inner.tensors;
    const int64_t columns = inner.columns(strip), E = inner.blocks.num_experts();
    const int64_t first = index * inner.ranks * STRIP;
    for (int64_t i = 0; i < 2; ++i) {
      const Tensor& matrix = i == 0 ? t.gate_b : t.up_b;
      inner.template pack_expand<P, BYTES>(matrix, strip, b.b_of_ranks[i] + first);
      const S* data = matrix.const_data_ptr<S>() + strip * STRIP * t.R;
      for (int64_t e = 0; e < E; ++e) {
        if (!inner.has_pairs(e)) continue;
        const int64_t rank = inner.blocks.ranks[e];
        inner.template pack_rows<P>(data + inner.blocks.begin[e], t.R, columns, rank, padded(rank),
                                    b.b_of_columns[i] + first + inner.begin[e] * STRIP);
      }
    }
    const S* down = t.down_a.const_data_ptr<S>() + strip * STRIP;
    for (int64_t e = 0; e < E; ++e) {
      if (!inner.has_pairs(e)) continue;
      inner.template pack_rows<P>(down + inner.blocks.begin[e] * t.F, t.F, inner.blocks.ranks[e],
                                  columns, STRIP, b.down_of_ranks + first + inner.begin[e] * STRIP);
    }
  }

  // Computes dz_gate, dz_up and dropout(a) of a chunk, the terms of dgate_out and dup_out, and
  // <dsummed, a>. In: z = u Bt of gate and up, and da = dh Ad.
  template <class Level, class V, class B>
  MOELORA_INLINE void differentiate(const Chunk& chunk, int64_t strip, int64_t first_token,
                                    bool is_first, C* range_products, V* const* values,
                                    const B& b) const {
    constexpr int BYTES = Level{}();
    constexpr int64_t LANES = Vector<C, BYTES>::LANES;
    using Numbers = typename Vector<C, BYTES>::type;
    const InnerTensors& t = inner.tensors;
    const int64_t columns = inner.columns(strip);
    const Mask& mask = inner.mask;
    alignas(64) S copies[3][STRIP];
    for (int64_t n = 0; n < chunk.size(); ++n) {
      const int64_t pair = inner.pair(chunk.begin + n), token = pair / t.K, row = n * STRIP;
      const S* gate_out = inner.row(t.gate_out, token, strip, copies[0]);
      const S* up_out = inner.row(t.up_out, token, strip, copies[1]);
      const S* dsummed_row = inner.row(dsummed, token, strip, copies[2]);
      const C weight = inner.weights[pair];
      C *gate = b.z[0] + row, *up = b.z[1] + row, *da = b.da + row;
      if (mask.active()) mask.apply(da, pair, strip * STRIP, t.F, columns, chunk.expert);
      // gate, up and da become dz_gate, dz_up and a.
      Numbers product{};
      for_activation(inner.activation, [&](auto activation) MOELORA_INLINE_LAMBDA {
        for (int64_t j = 0; j < STRIP; j += LANES) {
          const Numbers z = load_widened<S, C, BYTES>(gate_out + j) + load<C, BYTES>(gate + j);
          const Numbers z_up = load_widened<S, C, BYTES>(up_out + j) + load<C, BYTES>(up + j);
          const Numbers dsum = load_widened<S, C, BYTES>(dsummed_row + j);
          const Activated<Numbers> act = activate<activation()>(z);
          const Numbers da_j = load<C, BYTES>(da + j) + weight * dsum;
          const Numbers a = act.value * z_up;
          product += dsum * a;
          store<C, BYTES>(gate + j, da_j * z_up * act.slope);
          store<C, BYTES>(up + j, da_j * act.value);
          store<C, BYTES>(da + j, a);
        }
      });
      C& sum = range_products[chunk.begin + n];
      sum = (is_first ? C{0} : sum) + sum_lanes<C, BYTES>(product);
      if (weight == 0) {
        // The pair has no gradient but that of its weight. The product may be NaN.
        std::fill_n(gate, STRIP, C{0});
        std::fill_n(up, STRIP, C{0});
      }
      C* dgate = b.dout[0] + (token - first_token) * STRIP;
      C* dup = b.dout[1] + (token - first_token) * STRIP;
      for (int64_t j = 0; j < STRIP; j += LANES) {
        const Numbers dz_gate = load<C, BYTES>(gate + j), dz_up = load<C, BYTES>(up + j);
        store<C, BYTES>(dgate + j, load<C, BYTES>(dgate + j) + dz_gate);
        store<C, BYTES>(dup + j, load<C, BYTES>(dup + j) + dz_up);
        store_rounded<V, C, BYTES>(values[0] + row + j, dz_gate);
        store_rounded<V, C, BYTES>(values[1] + row + j, dz_up);
      }
      if (!adapters.needed()) continue;
      if (mask.active()) mask.apply(da, pair, strip * STRIP, t.F, columns, chunk.expert);
      for (int64_t j = 0; j < STRIP; j += LANES) {
        store_rounded<V, C, BYTES>(values[2] + row + j, load<C, BYTES>(da + j));
      }
    }
  }

  template <class Level>
  MOELORA_INLINE void run_range(int64_t range, const Ranges& ranges, C* scratch, int64_t* terms,
                                bool* has_total) const {
    using P = Operand<S, Level::bf16_pairs>;
    using Unit = typename P::Unit;
    const InnerTensors& t = inner.tensors;
    const TokenBlocks& blocks = inner.token_blocks;
    const int64_t range_rows = range * blocks.num_routed();
    Buffers<Unit, typename Inner<S, C>::template Value<P>> b{};
    divide(scratch, ranges.size(), b);
    b.sums.terms = terms;
    b.sums.has_total = has_total;
    const Tensor* const us[] = {&t.u_gate, &t.u_up, adapters.coefficients[2]};
    C* const expanded[] = {b.z[0], b.z[1], b.da};

    const int64_t matrix = inner.ranks * STRIP, E = inner.blocks.num_experts();
    const int64_t first_strip = ranges.first_strip(range);
    const int64_t end_strip = ranges.first_strip(range + 1);
    for (int64_t strip = first_strip; strip < end_strip; ++strip) {
      pack<P, Level{}()>(strip, strip - first_strip, b);
      if (adapters.needed()) adapters.clear(b.sums.strip(strip - first_strip, inner.ranks, E));
    }
    for (int64_t block = 0; block < blocks.count(); ++block) {
      for (int64_t strip = first_strip; strip < end_strip; ++strip) {
        const int64_t offset = (strip - first_strip) * matrix;
        const Unit* const packed[] = {b.b_of_ranks[0] + offset, b.b_of_ranks[1] + offset,
                                      b.down_of_ranks + offset};
        const auto strip_sums = b.sums.strip(strip - first_strip, inner.ranks, E);
        // Fetch the strip after this one.
        const bool is_last = strip + 1 == end_strip;
        const int64_t next_block = is_last ? block + 1 : block;
        if (next_block < blocks.count()) {
          for (const Tensor* rows : {&t.gate_out, &t.up_out, &dsummed}) {
            inner.prefetch(*rows, next_block, is_last ? first_strip : strip + 1);
          }
        }
        for (C* sums : b.dout) std::fill_n(sums, blocks.size() * STRIP, C{0});
        for (int64_t c = blocks.first_chunk(block); c < blocks.first_chunk(block + 1); ++c) {
          const Chunk& chunk = blocks.chunks()[c];
          // One call for all, because every call is inlined.
          for (int64_t i = 0; i < 3; ++i) {
            inner.template expand<Level>(chunk, *us[i], packed[i], expanded[i], b.u_units,
                                         b.partial);
          }
          differentiate<Level>(chunk, strip, blocks.first_token(block), strip == first_strip,
                               products + range_rows, b.values, b);
          for (int64_t i = 0; i < 2; ++i) {
            inner.template shrink<Level>(chunk, strip, strip == first_strip, b.values[i],
                                         b.b_of_columns[i] + offset, b.product,
                                         dh_sums[i] + range_rows * padded(t.width));
          }
          if (adapters.needed()) adapters.template add<Level>(chunk, b.values, strip_sums);
        }
        for (int64_t i = 0; i < 2; ++i) {
          inner.template write_block<Level>(b.dout[i], block, strip, *douts[i]);
        }
      }
    }
    if (!adapters.needed()) return;
    for (int64_t strip = first_strip; strip < end_strip; ++strip) {
      adapters.template finish<Level>(strip, b.sums.strip(strip - first_strip, inner.ranks, E));
    }
  }
};

// The results of the op, in the order of its schema. The gradients of the adapters are in x's dtype
// or in the compute dtype; there are none if they are not needed.
struct InnerGrads {
  Tensor dgate_out, dup_out, dh_gate, dh_up, dweights;
  std::vector<Tensor> adapters;
};

template <class S>
void run(const Tensor& dsummed, const Tensor& dh, const InnerTensors& tensors,
         const Routing& routing, const Blocks& blocks, const std::vector<double>& scaling,
         const Mask& mask, Activation activation, const InnerGrads& grads) {
  using C = Compute<S>;
  const ScalarType sum_dtype = compute_dtype(tensors.dtype);
  const TokenBlocks token_blocks(routing, tensors.T, tensors.K);
  const PairWeights<C> weights(tensors.weights, routing, sum_dtype);
  const Inner<S, C> inner(tensors, routing, token_blocks, blocks, weights, mask, activation);
  const int64_t width = tensors.width, w = padded(width), routed = token_blocks.num_routed();
  const Ranges ranges(tensors.F, w);
  const Tensor dh_gate_sums = empty(ranges.count * routed, w, sum_dtype);
  const Tensor dh_up_sums = empty(ranges.count * routed, w, sum_dtype);
  const Tensor inner_products = empty(ranges.count, routed, sum_dtype);
  const AdapterGrads<S, C> adapters{
      inner, grads.adapters, {&inner.tensors.u_gate, &inner.tensors.u_up, &dh}};
  const InnerBackward<S, C> backward{
      inner,
      adapters,
      dsummed,
      {&grads.dgate_out, &grads.dup_out},
      {dh_gate_sums.mutable_data_ptr<C>(), dh_up_sums.mutable_data_ptr<C>()},
      inner_products.mutable_data_ptr<C>()};
  const int64_t work =
      (tensors.T * tensors.K + tensors.R) * (8 * width + 64) * tensors.F / ranges.count;
  torch::stable::parallel_for(0, ranges.count, grain(work), [&](int64_t begin, int64_t end) {
    // Unit and V are at most as large as C.
    typename InnerBackward<S, C>::template Buffers<C, C> unused{};
    const auto scratch = uninitialised<C>(backward.divide(nullptr, ranges.size(), unused));
    std::vector<int64_t> terms(ranges.size() * blocks.num_experts());
    const auto has_total = std::make_unique<bool[]>(terms.size());
    vectorised([&](auto level) {
      for (int64_t range = begin; range < end; ++range) {
        backward.template run_range<decltype(level)>(range, ranges, scratch.get(), terms.data(),
                                                     has_total.get());
      }
    });
  });

  // Add the ranges.
  const std::vector<C> scales = to_compute<C>(scaling);
  const auto write_dh = [&](const Tensor& sums, const Tensor& dh_out) {
    S* data = dh_out.mutable_data_ptr<S>();
    inner.add_ranges(sums, ranges.count, [&](int64_t e, int64_t position, const C* sum) {
      const C scale = weights[routing.pair(position)] == 0 ? C{0} : scales[e];
      S* row = data + position * width;
      for (int64_t j = 0; j < width; ++j) {
        row[j] = narrow<S>(scale == 0 || j >= blocks.ranks[e] ? C{0} : scale * sum[j]);
      }
    });
    clear_rows<S>(dh_out, routing.num_routed());
  };
  write_dh(dh_gate_sums, grads.dh_gate);
  write_dh(dh_up_sums, grads.dh_up);
  C* dweights = grads.dweights.mutable_data_ptr<C>();
  std::fill_n(dweights, tensors.T * tensors.K, C{0});
  const C* products = inner_products.const_data_ptr<C>();
  for (int64_t range = 0; range < ranges.count; ++range) {
    for (int64_t n = 0; n < routed; ++n) dweights[inner.pair(n)] += products[range * routed + n];
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_inner_backward(
    Tensor dsummed, Tensor gate_out, Tensor up_out, Tensor u_gate, Tensor u_up, Tensor gate_b,
    Tensor up_b, Tensor down_a, Tensor dh, Tensor weights, Tensor order, Tensor offsets,
    Tensor /*tiles*/, Tensor /*chunks*/, std::vector<int64_t> ranks, std::vector<double> scaling,
    double dropout_p, bool dropout_per_expert, std::optional<Tensor> seed, std::string activation,
    bool needs_adapters) {
  const Blocks blocks(ranks);
  check_size(int64_t(scaling.size()), blocks.num_experts(), "scaling");
  const InnerTensors tensors(gate_out, up_out, u_gate, u_up, gate_b, up_b, down_a, weights, blocks);
  const auto [T, F, K, width, dtype] =
      std::tuple{tensors.T, tensors.F, tensors.K, tensors.width, tensors.dtype};
  dsummed = tensors.dense_matrix(dsummed, T, F, "dsummed");
  dh = tensors.matrix(dh, T * K, width, "dh");
  const Routing routing(order, offsets, blocks.num_experts());
  check_size(routing.num_pairs(), T * K, "order");
  const Mask mask(dropout_p, dropout_per_expert, seed);

  InnerGrads grads{.dgate_out = empty(T, F, dtype),
                   .dup_out = empty(T, F, dtype),
                   .dh_gate = empty(T * K, width, dtype),
                   .dh_up = empty(T * K, width, dtype),
                   .dweights = empty(T, K, compute_dtype(dtype)),
                   .adapters = {}};
  const std::array<ScalarType, ADAPTERS> dtypes{gate_b.scalar_type(), up_b.scalar_type(),
                                                down_a.scalar_type()};
  if (needs_adapters) {
    // The kernel writes x's dtype or the compute dtype. Any other dtype is cast at the end.
    const bool same = dtypes == std::array<ScalarType, ADAPTERS>{dtype, dtype, dtype};
    const ScalarType grad_dtype = same ? dtype : compute_dtype(dtype);
    for (const auto& [rows, columns] : {std::pair{F, tensors.R}, {F, tensors.R}, {tensors.R, F}}) {
      grads.adapters.push_back(empty(rows, columns, grad_dtype));
    }
  }
  for_dtype(dtype, [&](auto type) {
    run<typename decltype(type)::type>(dsummed, dh, tensors, routing, blocks, scaling, mask,
                                       activation_named(activation), grads);
  });
  std::array<Tensor, ADAPTERS> adapters{absent(dtypes[0]), absent(dtypes[1]), absent(dtypes[2])};
  for (size_t i = 0; i < grads.adapters.size(); ++i) {
    adapters[i] = cast(grads.adapters[i], dtypes[i]);
  }
  return {grads.dgate_out, grads.dup_out, grads.dh_gate, grads.dh_up,
          grads.dweights,  adapters[0],   adapters[1],   adapters[2]};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("ffn_inner_backward", TORCH_BOX(&moelora::ffn_inner_backward));
}
