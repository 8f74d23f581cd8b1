// A call as a list of work: weights to write in order, matrices to pack, products, gradients.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "multiply.h"
#include "pack.h"
#include "team.h"

constexpr int64_t kRangeOutputs = 1024;  // whose sums a thread holds: 256 kB
constexpr int64_t kSlab = 256;           // features packed, or blocks written, at once
constexpr int64_t kSumTiles = 8;         // that one sum over tokens runs through
constexpr int64_t kPartFloats = 16 << 20;  // that packed tiles may take, if kSumTiles fit

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The blocks of a weight, as a pass reads them: in place, or written in the order of the pass.
struct Values {
    const void* data;  // [blocks][b_out][b_in]
    int64_t blocks;
    int32_t b_out, b_in;
    bool turned;  // the pass is over the transpose
    bool half, pairs;
    const int32_t* slots;  // in order
    int64_t at = 0;        // in the scratch memory

    int64_t size() const { return static_cast<int64_t>(b_out) * b_in; }

    bool in_place() const {
        const bool readable = pairs ? !turned : !half;
        // Of blocks smaller than a cache line, most of what comes along would be others.
        return readable && size() * (half ? 2 : 4) >= 64;
    }

    int64_t floats() const { return in_place() ? 0 : blocks * size() / (pairs ? 2 : 1); }

    void write(int64_t block, float* base) const {
        float* to = base + at + block * size() / (pairs ? 2 : 1);
        const int64_t from = slots[block] * size();
        const uint16_t* halves = static_cast<const uint16_t*>(data) + from;
        if (!half)
            std::memcpy(to, static_cast<const float*>(data) + from, 4 * size());
        else if (!pairs)
            for (int64_t i = 0; i < size(); ++i) to[i] = wide(halves[i]);
        else if (!turned)
            std::memcpy(to, halves, 2 * size());
        else
            for (int32_t r = 0; r < b_out; r += 2, halves += 2 * b_in)
                for (int32_t c = 0; c < b_in; ++c) *to++ = pair_of(halves[c], halves[b_in + c]);
    }
};

// A matrix [tokens, features] and the tiles it is packed into.
struct Packing {
    enum Kind { kFloats, kFeaturePairs, kTokenPairs };
    Matrix from;
    int64_t features;
    Kind kind;
    int64_t at = 0;  // in the scratch memory

    int64_t step() const { return features * (kind == kFloats ? kTile : kTile / 2); }  // a tile

    void pack(int64_t start, int64_t tokens, int64_t first, int64_t last, float* tile) const {
        if (kind == kFloats)
            pack_floats(from, start, tokens, first, last, tile);
        else if (kind == kFeaturePairs)
            pack_feature_pairs(from, start, tokens, first, last, tile);
        else
            pack_token_pairs(from, start, tokens, first, last, tile);
    }
};

// One weight in a sum: tiles of `packing` times `values`.
struct Term {
    int packing, values;  // their numbers
    Order order;
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
};

// Something first .. last of one of several things.
struct Range {
    int64_t of, first, last;
};

// What is worked on at once: as many tiles as scratch memory takes.
struct Part {
    int64_t start, tiles;
};

// Memory that a calling thread keeps between calls: fresh pages would cost more than packing does.
class Scratch {
public:
    ~Scratch() { std::free(data_); }

    float* floats(int64_t count) {
        if (count > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            if (posix_memalign(&data_, 4096, static_cast<size_t>(count) * 4)) throw std::bad_alloc();
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
            const int64_t slab = std::max<int64_t>(1, kSlab * 64 / v.size());
            if (v.floats()) split(v.blocks, slab, &v - values.data(), &writes_);
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
            at.push_back(half && s.values ? take(s.blocks * s.b_out * s.b_in) : -1);
            at.push_back(half && s.bias ? take(s.rows * s.b_out) : -1);
            split(s.rows, std::max<int64_t>(1, ceil_div(s.rows, 8 * threads)), &s - sums.data(),
                  &sum_ranges_);
        }
        base_ = scratch.floats(floats);
        for (size_t i = 0; i < sums.size(); ++i) {
            Sum& s = sums[i];
            s.value_sums = half ? base_ + at[2 * i] : static_cast<float*>(s.values);
            s.bias_sums = half ? base_ + at[2 * i + 1] : static_cast<float*>(s.bias);
        }
    }

    // Ranges of outputs: all of a tile, if there are tiles enough for all threads.
    void lay_out_products() {
        int64_t outputs = 0;
        for (const Product& p : products) outputs += p.rows * p.b;
        const int64_t wanted = ceil_div(outputs * std::max<int64_t>(1, tiles_), 4 * threads);
        const int64_t most = std::min(kRangeOutputs, round_up(std::max<int64_t>(1, wanted), 16));
        for (const Product& p : products) {
            const int64_t rows = std::max<int64_t>(1, most / p.b);
            split(p.rows, rows, &p - products.data(), &ranges_);
            // unpack reads 16 rows more than there are
            range_floats_ = std::max(range_floats_, (rows * p.b + 16) * kTile);
        }
        whole_tiles_ = tiles_ >= 4 * threads;
    }

    static void split(int64_t count, int64_t step, int64_t of, std::vector<Range>* ranges) {
        for (int64_t first = 0; first < count; first += step)
            ranges->push_back({of, first, std::min(count, first + step)});
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
            const int64_t whole = whole_tiles_ ? count(ranges_) : 1;
            team.each(part.tiles * count(ranges_) / whole, [&](int64_t i) {
                for (int64_t j = i * whole; j < (i + 1) * whole; ++j)
                    multiply<Lane>(part, ranges_[j % count(ranges_)], j / count(ranges_), thread);
            });
            team.each(count(sum_ranges_),
                      [&](int64_t i) { sum_up<Lane>(part, sum_ranges_[i]); });
        }
        if (!half) return;
        team.each(count(sum_ranges_), [this](int64_t i) { narrow_sums(sum_ranges_[i]); });
    }

    template <typename Lane>
    void multiply(const Part& part, const Range& r, int64_t tile, int thread) {
        const Product& p = products[r.of];
        float* held = base_ + held_[thread];
        std::fill(held, held + (r.last - r.first) * p.b * kTile, 0.0f);
        const int64_t start = (part.start + tile) * kTile;
        for (const Term& term : p.terms) {
            const Values& v = values[term.values];
            const Packing& x = packings[term.packing];
            Weights w;
            w.order = term.order;
            w.rows = p.rows;
            w.values = v.in_place() ? static_cast<const float*>(v.data) : base_ + v.at;
            w.slots = v.in_place() ? v.slots : nullptr;
            w.outputs = p.b;
            w.units = (v.turned ? v.b_out : v.b_in) / Lane::kPerUnit;
            w.turned = v.turned;
            w.x = base_ + x.at + tile * x.step();
            add_rows<Lane>(w, r.first, r.last, tokens - start, held);
        }
        unpack(held, r.first * p.b, (r.last - r.first) * p.b, start, tokens, p.output);
    }

    template <typename Lane>
    void sum_up(const Part& part, const Range& r) {
        const Sum& s = sums[r.of];
        const Packing& dy = packings[s.dy];
        for (int64_t tile = 0; tile < part.tiles; tile += kSumTiles) {
            const int64_t tiles = std::min(kSumTiles, part.tiles - tile);
            const bool add = part.start + tile > 0;
            const Tiles left{base_ + dy.at + tile * dy.step(), dy.step()};
            if (s.values) {
                const Packing& x = packings[s.x];
                const Tiles right{base_ + x.at + tile * x.step(), x.step()};
                const Gradient g{s.order, s.rows, s.b_out, s.b_in, left, right, tiles,
                                 s.value_sums, add};
                outer_rows<Lane>(g, r.first, r.last);
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
        if (s.values)
            round(s.value_sums, s.values, numbers * r.first / s.rows, numbers * r.last / s.rows);
        if (s.bias) round(s.bias_sums, s.bias, r.first * s.b_out, r.last * s.b_out);
    }

    int64_t tiles_ = 0;  // of a part
    bool whole_tiles_ = false;
    std::vector<Range> writes_, packs_, ranges_, sum_ranges_;
    int64_t range_floats_ = 0;
    std::vector<int64_t> held_;  // where each thread's sums are
    float* base_ = nullptr;
};
