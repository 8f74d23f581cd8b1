// A call as a list of work: weights to write in order, matrices to pack, products, gradients.
#pragma once

#include <cstdlib>
#include <new>
#include <sys/mman.h>
#include <vector>

#include "multiply.h"
#include "pack.h"
#include "sums.h"
#include "team.h"

constexpr int64_t kRangeSums = 2048;     // of 64 tokens, that a thread holds: 512 kB
constexpr int64_t kSlab = 256;           // features packed, or blocks written, at once
constexpr int64_t kSingleRows = 512;     // whose gradients stay in L2 for a sum over tokens
constexpr int64_t kSumTiles = 8;         // that one sum over tokens runs through
constexpr int64_t kNearFloats = 1 << 18;   // of tiles that stay in L2 beside sums
constexpr int64_t kTilesAtOnce = 4;      // that a weight meets when it comes by
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kPartFloats = 4 << 20;  // that packed tiles may take, if kSumTiles fit

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The blocks of a weight as a pass reads them: in its order, as lanes of outputs_at_once.
struct Values {
    const void* data;  // [blocks][b_out][b_in]
    int64_t blocks;
    int32_t b_out, b_in;
    bool turned;  // the pass is over the transpose
    bool half, pairs;
    Order order;
    int64_t rows;    // block rows of the pass
    int64_t at = 0;  // in the scratch memory

    bool single() const { return b_out == 1 && b_in == 1; }
    int64_t units() const { return (turned ? b_out : b_in) / (pairs ? 2 : 1); }
    int64_t outputs() const { return turned ? b_in : b_out; }
    int64_t floats() const {
        if (single()) return Singles::floats(rows, blocks, order.bands);
        return blocks * outputs() * units();
    }
    Singles singles(float* base) const { return {order, rows, blocks, base + at}; }

    void write(int64_t block, float* base) const {
        const int64_t size = static_cast<int64_t>(b_out) * b_in, from = order.slots[block] * size;
        float* to = base + at + block * outputs() * units();
        // Between neighbours of a sum, and between outputs.
        const int64_t step = turned ? b_in : 1, across = turned ? 1 : b_in;
        const int once = outputs_at_once(static_cast<int>(outputs()));
        const float* whole = static_cast<const float*>(data) + from;
        const uint16_t* halves = static_cast<const uint16_t*>(data) + from;
        for (int64_t output = 0; output < outputs(); output += once)
            for (int64_t unit = 0; unit < units(); ++unit)
                for (int64_t o = output; o < output + once; ++o)
                    if (!half)
                        *to++ = whole[o * across + unit * step];
                    else if (!pairs)
                        *to++ = wide(halves[o * across + unit * step]);
                    else
                        *to++ = pair_of(halves[o * across + 2 * unit * step],
                                        halves[o * across + (2 * unit + 1) * step]);
    }
};

// A matrix [tokens, features] and the tiles it is packed into.
struct Packing {
    enum Kind { kFloats, kPanels, kFeaturePairs, kTokenPairs, kPairPanels };
    Matrix from;
    int64_t features;
    Kind kind;
    int64_t at = 0;  // in the scratch memory

    // Floats of a tile.
    int64_t step() const { return features * (kind <= kPanels ? kTile : kTile / 2); }

    void pack(int64_t start, int64_t tokens, int64_t first, int64_t last, float* tile) const {
        constexpr decltype(&pack_floats) by_kind[] = {pack_floats, pack_panels, pack_feature_pairs,
                                                      pack_token_pairs, pack_pair_panels};
        by_kind[kind](from, start, tokens, first, last, tile);
    }
};

// One weight in a sum: tiles of `packing` times `values`.
struct Term {
    int packing, values;  // their numbers
};

// A matrix [tokens, rows * b] that is the sum of terms.
struct Product {
    std::vector<Term> terms;
    Output output;
    int64_t rows;
    int32_t b;  // outputs a block row
};

// The gradients of a weight's values and bias, or of one of them.
struct Sum {
    int dy, x;  // numbers of packings; x is -1 where only the bias is asked for
    Order order;
    int64_t rows;
    int32_t b_out, b_in;
    int64_t blocks;
    void* values;  // fp32 or bf16 [blocks][b_out][b_in], or null
    void* bias;    // [rows * b_out], or null
    float* value_sums = nullptr;  // fp32: `values` itself, or scratch memory
    float* bias_sums = nullptr;

    bool single() const { return b_out == 1 && b_in == 1; }
    Singles singles() const { return {order, rows, blocks, value_sums}; }
};

// A band of single weights of a range of rows, of values or of a sum, that is to be arranged.
struct Arrangement {
    const Values* values;
    const Sum* sum;
    int64_t first, last;
    int32_t band;
};

// Something first .. last of one of several things.
struct Range {
    int64_t of, first, last;
};

// What is worked on at once: as many tiles as scratch memory takes.
struct Part {
    int64_t start, tiles;
};

// Fresh memory that is about to be written comes in pages of 2 MB, where the system has them.
static inline void use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (!data || bytes < 4 * kHugePage) return;
    const uintptr_t first = reinterpret_cast<uintptr_t>(data), page = kHugePage;
    const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish
#endif
}

// Memory that a calling thread keeps between calls: fresh pages would cost more than packing does.
class Scratch {
public:
    ~Scratch() { std::free(data_); }

    float* floats(int64_t count) {
        if (count > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const size_t bytes = static_cast<size_t>(round_up(count * 4, kHugePage));
            if (posix_memalign(&data_, kHugePage, bytes)) throw std::bad_alloc();
            use_huge_pages(data_, bytes);
            size_ = count;
        }
        return static_cast<float*>(data_);
    }

private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

class Plan {
public:
    int64_t tokens = 0;
    int threads = 1;
    bool half = false, pairs = false;
    std::vector<Values> values;
    std::vector<Packing> packings;
    std::vector<Product> products;
    std::vector<Sum> sums;

    void run() {
        lay_out();
        Team::run(threads, [this](Team& team, int thread) {
            if (pairs)
                work<Pairs>(team, thread);
            else
                work<Floats>(team, thread);
        });
    }

private:
    void lay_out() {
        static thread_local Scratch scratch;
        const int64_t tiles = ceil_div(tokens, kTile);
        int64_t floats = 0, step = 0;
        const auto take = [&floats](int64_t count) {
            const int64_t at = floats;
            floats += round_up(count, 16);
            return at;
        };
        for (Values& v : values) {
            v.at = take(v.floats());
            if (v.single()) continue;  // lay_out_products
            const int64_t slab = std::max<int64_t>(1, kSlab * 64 / (v.outputs() * v.units()));
            split(v.blocks, slab, &v - values.data(), &writes_);
        }
        for (const Packing& p : packings) step += p.step();
        tiles_ = std::min(tiles, std::max(kSumTiles, kPartFloats / std::max<int64_t>(1, step)));
        tiles_ = std::min(tiles, round_up(tiles_, kSumTiles));
        for (Packing& p : packings) {
            p.at = take(tiles_ * p.step());
            split(p.features, kSlab, &p - packings.data(), &packs_);
        }
        lay_out_products();
        for (int i = 0; i < threads; ++i) held_.push_back(take(range_floats_));
        std::vector<int64_t> at;
        for (Sum& s : sums) {
            if (s.values && s.single())
                at.push_back(take(Singles::floats(s.rows, s.blocks, s.order.bands)));
            else
                at.push_back(half && s.values ? take(s.blocks * s.b_out * s.b_in) : -1);
            at.push_back(half && s.bias ? take(s.rows * s.b_out) : -1);
            const int64_t rows = std::max<int64_t>(1, ceil_div(s.rows, 8 * threads));
            const size_t made = sum_ranges_.size();
            split(s.rows, s.single() ? std::min(rows, kSingleRows) : rows, &s - sums.data(),
                  &sum_ranges_);
            if (s.values && s.single())
                for (size_t i = made; i < sum_ranges_.size(); ++i)
                    arrange(nullptr, &s, sum_ranges_[i], s.order.bands);
        }
        base_ = scratch.floats(floats);
        for (const Product& p : products) {
            use_huge_pages(p.output.y, tokens * p.output.stride * (half ? 2 : 4));
            use_huge_pages(p.output.inputs, tokens * p.output.stride * (half ? 2 : 4));
        }
        for (size_t i = 0; i < sums.size(); ++i) {
            Sum& s = sums[i];
            use_huge_pages(s.values, s.blocks * s.b_out * s.b_in * (half ? 2 : 4));
            s.value_sums = at[2 * i] >= 0 ? base_ + at[2 * i] : static_cast<float*>(s.values);
            s.bias_sums = half ? base_ + at[2 * i + 1] : static_cast<float*>(s.bias);
        }
    }

    // Ranges of outputs: all of a panel, if there are panels enough for all threads.
    void lay_out_products() {
        int64_t outputs = 0;
        for (const Product& p : products) outputs += p.rows * p.b;
        int64_t inputs = 0;  // floats of a tile of a product
        for (const Product& p : products)
            for (const Term& term : p.terms) inputs = std::max(inputs, packings[term.packing].step());
        const int64_t near = std::max<int64_t>(1, kNearFloats / std::max<int64_t>(1, inputs));
        const int64_t at_once = single() ? std::min(kTilesAtOnce, near) : kTilesAtOnce;
        panel_ = std::clamp<int64_t>(tiles_ / (2 * threads), 1, at_once);
        const int64_t panels = ceil_div(std::max<int64_t>(1, tiles_), panel_);
        const int64_t wanted = std::max<int64_t>(1, ceil_div(outputs * panels, 4 * threads));
        const int64_t most = std::min(kRangeSums / panel_, round_up(wanted, 16));
        for (const Product& p : products) {
            const int64_t ranges = ceil_div(p.rows * p.b, std::max<int64_t>(most, 1));
            const int64_t rows = std::max<int64_t>(1, std::min(most / p.b, ceil_div(p.rows, ranges)));
            const size_t made = ranges_.size();
            split(p.rows, rows, &p - products.data(), &ranges_);
            for (const Term& term : p.terms)
                if (const Values& v = values[term.values]; v.single())
                    for (size_t i = made; i < ranges_.size(); ++i)
                        arrange(&v, nullptr, ranges_[i], v.order.bands);
            // unpack reads 16 rows more than there are
            range_floats_ = std::max(range_floats_, panel_ * (rows * p.b + 16) * kTile);
        }
    }

    bool single() const { return !values.empty() && values[0].single(); }

    static void split(int64_t count, int64_t step, int64_t of, std::vector<Range>* ranges) {
        for (int64_t first = 0; first < count; first += step)
            ranges->push_back({of, first, std::min(count, first + step)});
    }

    void arrange(const Values* values, const Sum* sum, const Range& rows, int32_t bands) {
        for (int32_t band = 0; band < bands; ++band)
            arrangements_.push_back({values, sum, rows.first, rows.last, band});
    }

    template <typename Lane>
    void work(Team& team, int thread) {
        const auto count = [](const std::vector<Range>& ranges) {
            return static_cast<int64_t>(ranges.size());
        };
        team.each(count(writes_), [this](int64_t i) {
            const Range& r = writes_[i];
            for (int64_t b = r.first; b < r.last; ++b) values[r.of].write(b, base_);
        });
        team.each(static_cast<int64_t>(arrangements_.size()), [this](int64_t i) {
            const Arrangement& a = arrangements_[i];
            const Singles s = a.values ? a.values->singles(base_) : a.sum->singles();
            s.arrange(a.band, a.first, a.last);
            if (a.values) s.read(a.band, a.first, a.last, a.values->data, half);
        });
        const int64_t tiles = ceil_div(tokens, kTile);
        for (int64_t start = 0; start < tiles; start += tiles_) {
            const Part part{start, std::min(tiles_, tiles - start)};
            team.each(part.tiles * count(packs_), [&](int64_t i) {
                const int64_t tile = i / count(packs_);
                const Range& r = packs_[i % count(packs_)];
                const Packing& p = packings[r.of];
                p.pack((part.start + tile) * kTile, tokens, r.first, r.last,
                       base_ + p.at + tile * p.step());
            });
            team.each(ceil_div(part.tiles, panel_) * count(ranges_), [&](int64_t i) {
                const int64_t first = i / count(ranges_) * panel_;
                const int64_t tiles = std::min(panel_, part.tiles - first);
                multiply<Lane>(part.start, first, tiles, ranges_[i % count(ranges_)], thread);
            });
            team.each(count(sum_ranges_),
                      [&](int64_t i) { sum_up<Lane>(part, sum_ranges_[i]); });
        }
        team.each(static_cast<int64_t>(arrangements_.size()), [this](int64_t i) {
            const Arrangement& a = arrangements_[i];
            if (a.sum) a.sum->singles().write(a.band, a.first, a.last, a.sum->values, half);
        });
        if (!half) return;
        team.each(count(sum_ranges_), [this](int64_t i) { narrow_sums(sum_ranges_[i]); });
    }

    // One range of the outputs of some tiles of the part that begins at `part`.
    template <typename Lane>
    void multiply(int64_t part, int64_t first, int64_t tiles, const Range& r, int thread) {
        const Product& p = products[r.of];
        const int64_t outputs = (r.last - r.first) * p.b;
        const int64_t start = (part + first) * kTile, end = std::min(tokens, start + tiles * kTile);
        const Tiles<float> sums{base_ + held_[thread], (outputs + 16) * kTile};
        std::fill(sums.data, sums.data + tiles * sums.step, 0.0f);
        for (const Term& term : p.terms) {
            const Values& v = values[term.values];
            const Packing& x = packings[term.packing];
            const Tiles<const float> in{base_ + x.at + first * x.step(), x.step()};
            if (v.single()) {
                add_single_rows(v.singles(base_), r.first, r.last, end - start, in, sums);
                continue;
            }
            const Weights w{v.order, base_ + v.at, p.rows,
                            p.b,     static_cast<int32_t>(v.units()), in};
            add_rows<Lane>(w, r.first, r.last, end - start, sums);
        }
        for (int64_t tile = 0; tile < tiles; ++tile)
            unpack(sums.data + tile * sums.step, r.first * p.b, outputs, start + tile * kTile,
                   tokens, p.output);
    }

    template <typename Lane>
    void sum_up(const Part& part, const Range& r) {
        const Sum& s = sums[r.of];
        const Packing& dy = packings[s.dy];
        for (int64_t tile = 0; tile < part.tiles; tile += kSumTiles) {
            const int64_t tiles = std::min(kSumTiles, part.tiles - tile);
            const bool add = part.start + tile > 0;
            const Tiles<const float> left{base_ + dy.at + tile * dy.step(), dy.step()};
            if (s.values) {
                const Packing& x = packings[s.x];
                const Tiles<const float> right{base_ + x.at + tile * x.step(), x.step()};
                const Gradient g{s.order, s.rows, s.b_out, s.b_in, left, right, tiles,
                                 s.value_sums, add};
                if (s.single())
                    single_gradient(s.singles(), r.first, r.last, tiles, left, right, add);
                else
                    add_gradient<Lane>(g, r.first, r.last);
            }
            if (s.bias)
                sum_tokens<Lane>(left, tiles, r.first * s.b_out, r.last * s.b_out, add,
                                 s.bias_sums);
        }
    }

    // Round what a range of block rows has come to; the values' share of it is by position.
    void narrow_sums(const Range& r) {
        const Sum& s = sums[r.of];
        const auto round = [](const float* from, void* to, int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) static_cast<uint16_t*>(to)[i] = narrow(from[i]);
        };
        const int64_t numbers = s.blocks * s.b_out * s.b_in;
        if (s.values && !s.single())
            round(s.value_sums, s.values, numbers * r.first / s.rows, numbers * r.last / s.rows);
        if (s.bias) round(s.bias_sums, s.bias, r.first * s.b_out, r.last * s.b_out);
    }

    int64_t tiles_ = 0;  // of a part
    int64_t panel_ = 1;  // tiles that are multiplied at once
    std::vector<Arrangement> arrangements_;
    std::vector<Range> writes_, packs_, ranges_, sum_ranges_;
    int64_t range_floats_ = 0;
    std::vector<int64_t> held_;  // where each thread's sums are
    float* base_ = nullptr;
};
