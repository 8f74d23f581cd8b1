// What a call is made of: weights in the order of a pass, packed matrices, products, gradients.
#pragma once

#include <vector>

#include "panels.h"
#include "scratch.h"
#include "sums.h"

constexpr int64_t kSlotsAhead = 16;  // blocks that are fetched before they are written

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
    bool panels() const { return by_panel(b_out, b_in, pairs); }
    int64_t units() const { return (turned ? b_out : b_in) / (pairs ? 2 : 1); }
    int64_t outputs() const { return turned ? b_in : b_out; }
    int64_t floats() const {
        if (single()) return Singles::floats(rows, blocks, order.bands);
        return blocks * a_block();
    }
    int64_t a_block() const { return outputs() * units(); }
    Singles singles(float* base) const { return {order, rows, blocks, base + at}; }

    // Blocks first .. last of the order.
    void write(int64_t first, int64_t last, float* out) const {
        if (panels())
            each_block(first, last, out, [&](int64_t from, float* to) { write_panels(from, to); });
        else if (!pairs)
            each_block(first, last, out, [&](int64_t from, float* to) { write_floats(from, to); });
        else if (b_out == 4 && b_in == 4)
            each_block(first, last, out, [this](int64_t from, float* to) {
                pairs_of_four(static_cast<const uint16_t*>(data) + from, turned, to);
            });
        else if (outputs() % 4 == 0)
            write_pairs<4>(first, last, b_out, b_in, out);
        else if (outputs() % 2 == 0)
            write_pairs<2>(first, last, b_out, b_in, out);
        else
            write_pairs<1>(first, last, b_out, b_in, out);
    }

    // Calls write(where a block begins in `data`, where it goes).
    template <typename Write>
    void each_block(int64_t first, int64_t last, float* to, Write write) const {
        const int64_t size = static_cast<int64_t>(b_out) * b_in, bytes = half ? 2 : 4;
        const int64_t fetched = std::min<int64_t>(size * bytes, 1024), step = a_block();
        const int64_t end = blocks - 1;
        const int32_t* slots = order.slots;  // anywhere in memory
        const char* source = static_cast<const char*>(data);
        for (int64_t b = first; b < last; ++b, to += step) {
            const char* next = source + slots[std::min(b + kSlotsAhead, end)] * size * bytes;
            for (int64_t i = 0; i < fetched; i += 64) __builtin_prefetch(next + i);
            write(slots[b] * size, to);
        }
    }

    void write_floats(int64_t from, float* to) const {
        // Between neighbours of a sum, and between outputs.
        const int64_t step = turned ? b_in : 1, across = turned ? 1 : b_in;
        const int once = outputs_at_once(static_cast<int>(outputs()));
        const float* whole = static_cast<const float*>(data) + from;
        const uint16_t* halves = static_cast<const uint16_t*>(data) + from;
        for (int64_t output = 0; output < outputs(); output += once)
            for (int64_t unit = 0; unit < units(); ++unit)
                for (int64_t o = output; o < output + once; ++o)
                    *to++ = half ? wide(halves[o * across + unit * step])
                                 : whole[o * across + unit * step];
    }

    // The same of pairs, of blocks [rows][columns].
    template <int kOnce>  // outputs_at_once
    void write_pairs(int64_t first, int64_t last, int64_t rows, int64_t columns, float* out) const {
        const uint16_t* halves = static_cast<const uint16_t*>(data);
        if (turned)
            each_block(first, last, out, [=](int64_t from, float* to) {
                for (int64_t output = 0; output < columns; output += kOnce)
                    for (int64_t row = 0; row < rows; row += 2, to += kOnce)
                        for (int o = 0; o < kOnce; ++o) {
                            const uint16_t* at = halves + from + row * columns + output + o;
                            to[o] = pair_of(at[0], at[columns]);
                        }
            });
        else
            each_block(first, last, out, [=](int64_t from, float* to) {
                for (int64_t output = 0; output < rows; output += kOnce)
                    for (int64_t column = 0; column < columns; column += 2, to += kOnce)
                        for (int o = 0; o < kOnce; ++o)
                            std::memcpy(to + o, halves + from + (output + o) * columns + column, 4);
            });
    }

    // As [outputs / 16][units][16], of the numbers from `from` on.
    void write_panels(int64_t from, float* to) const {
        if (pairs) return write_pair_panels(static_cast<const uint16_t*>(data) + from, to);
        alignas(64) float rows[256];
        for (int64_t output = 0; output < outputs(); output += kPanel)
            for (int64_t unit = 0; unit < units(); unit += kPanel, to += 256) {
                const int64_t corner = from + (turned ? unit * b_in + output : output * b_in + unit);
                for (int i = 0; i < 16; ++i)
                    read(data, corner + i * b_in, half, 16, (turned ? to : rows) + 16 * i);
                if (!turned) transpose(rows, 16, to, 16);
            }
    }

    // The same of pairs, 16 of which are in 32 numbers.
    void write_pair_panels(const uint16_t* block, float* to) const {
        for (int64_t output = 0; output < outputs(); output += kPanel)
            for (int64_t unit = 0; unit < units(); unit += kPanel, to += 256) {
                if (!turned) {
                    const uint16_t* corner = block + output * b_in + 2 * unit;
                    transpose(reinterpret_cast<const float*>(corner), b_in / 2, to, 16);
                    continue;
                }
                const uint16_t* row = block + 2 * unit * b_in + output;
                for (int i = 0; i < 16; ++i, row += 2 * b_in) zip_16(row, row + b_in, to + 16 * i);
            }
    }
};

// A matrix [tokens, features] and the tiles it is packed into: floats, or pairs of features, of
// tokens, or of both, one behind the other.
struct Packing {
    Matrix from;
    int64_t features;
    bool panels;  // floats
    PairLayout by_feature = kNoPairs, by_token = kNoPairs;
    int64_t at = 0;  // in the scratch memory

    bool pairs() const { return by_feature || by_token; }
    // Floats of a tile, and of what is before its pairs of tokens.
    int64_t step() const {
        if (!pairs()) return features * kTile;
        return features * kTile / 2 * ((by_feature ? 1 : 0) + (by_token ? 1 : 0));
    }
    int64_t before_tokens() const { return by_feature ? features * kTile / 2 : 0; }

    void pack(int64_t start, int64_t tokens, int64_t first, int64_t last, float* tile) const {
        if (pairs())
            pack_pairs(from, start, tokens, first, last, by_feature, tile, by_token,
                       tile + before_tokens());
        else
            (panels ? pack_panels : pack_floats)(from, start, tokens, first, last, tile);
    }
};

// Something first .. last of one of several things; of gradients' rows, some bands.
struct Range {
    int64_t of, first, last;
    int32_t first_band = 0, last_band = 0;
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

// Sums of a block, rounded if `half`: as they lie, or from [outputs / 4][inputs / 4][4][4].
static void put_numbers(const float* from, int64_t b_out, int64_t b_in, bool half, void* to) {
    if (!half) return void(std::memcpy(to, from, b_out * b_in * 4));
    for (int64_t i = 0; i < b_out * b_in; i += 16)
        narrow_16(from + i, static_cast<uint16_t*>(to) + i);
}

static void put_quads(const float* from, int64_t b_out, int64_t b_in, bool half, void* to) {
    alignas(32) uint16_t halves[16];
    for (int64_t output = 0; output < b_out; output += 4)
        for (int64_t input = 0; input < b_in; input += 4, from += 16) {
            if (half) narrow_16(from, halves);
            for (int o = 0; o < 4; ++o) {
                const int64_t at = (output + o) * b_in + input;
                if (half)
                    std::memcpy(static_cast<uint16_t*>(to) + at, halves + 4 * o, 8);
                else
                    std::memcpy(static_cast<float*>(to) + at, from + 4 * o, 16);
            }
        }
}

// The gradients of a weight's values and bias, or of one of them.
struct Sum {
    int dy, x;  // numbers of packings; x is -1 where only the bias is asked for
    Order order;
    int64_t rows;
    int32_t b_out, b_in;
    int64_t blocks;
    bool pairs;
    void* values;  // fp32 or bf16 [blocks][b_out][b_in], or null
    void* bias;    // [rows * b_out], or null
    float* value_sums = nullptr;  // fp32: `values` itself, or scratch memory; null: a thread's own
    float* bias_sums = nullptr;

    bool single() const { return b_out == 1 && b_in == 1; }
    bool panels() const { return by_panel(b_out, b_in, pairs); }
    bool quads() const { return by_quad(b_out, b_in, pairs); }
    // Whether sums lie in the order of blocks until all tokens are in them, not by slot.
    bool in_order() const { return values && (quads() || panels()); }
    Singles singles() const { return {order, rows, blocks, value_sums}; }

    // What a range has come to in `sums`, to its slots.
    void put(InOrder sums, const Range& r, bool half) const {
        const int64_t size = static_cast<int64_t>(b_out) * b_in, bytes = half ? 2 : 4;
        for (int32_t band = r.first_band; band < r.last_band; ++band) {
            const int32_t* starts = order.starts + band * rows;
            const float* from = sums.band(order, rows, band, r.first, r.last, size);
            for (int64_t b = starts[r.first]; b < starts[r.last]; ++b, from += size) {
                const int64_t next = order.slots[std::min(b + kSlotsAhead, blocks - 1)] * size;
                for (int64_t i = 0; i < std::min<int64_t>(size * bytes, 1024); i += 64)
                    __builtin_prefetch(static_cast<const char*>(values) + next * bytes + i, 1);
                (quads() ? put_quads : put_numbers)(from, b_out, b_in, half,
                                                    static_cast<char*>(values) +
                                                        order.slots[b] * size * bytes);
            }
        }
    }
};

// A band of single weights of a range of rows, of values or of a sum, that is to be arranged.
struct Arrangement {
    const Values* values;
    const Sum* sum;
    int64_t first, last;
    int32_t band;
};

// What is worked on at once: as many tiles as scratch memory takes.
struct Part {
    int64_t start, tiles;
};
