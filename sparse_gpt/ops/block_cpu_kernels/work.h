// What a call is made of: weights in the order of a pass, packed matrices, products, gradients.
#pragma once

#include <vector>

#include "panels.h"
#include "scratch.h"
#include "sums.h"

constexpr int64_t kSlotsAhead = 4;  // blocks that are fetched before they are written

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
    bool panels() const { return !pairs && by_panel(b_out, b_in); }
    int64_t units() const { return (turned ? b_out : b_in) / (pairs ? 2 : 1); }
    int64_t outputs() const { return turned ? b_in : b_out; }
    int64_t floats() const {
        if (single()) return Singles::floats(rows, blocks, order.bands);
        return blocks * outputs() * units();
    }
    Singles singles(float* base) const { return {order, rows, blocks, base + at}; }

    void write(int64_t block, float* base) const {
        const int64_t size = static_cast<int64_t>(b_out) * b_in, from = order.slots[block] * size;
        const int64_t bytes = half ? 2 : 4;
        const int64_t next = order.slots[std::min(block + kSlotsAhead, blocks - 1)];
        for (int64_t i = 0; i < std::min<int64_t>(size * bytes, 1024); i += 64)
            __builtin_prefetch(static_cast<const char*>(data) + next * size * bytes + i);
        float* to = base + at + block * outputs() * units();
        if (panels()) return write_panels(from, to);
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

    // As [outputs / 16][units][16], of the numbers from `from` on.
    void write_panels(int64_t from, float* to) const {
        alignas(64) float rows[256];
        for (int64_t output = 0; output < outputs(); output += kPanel)
            for (int64_t unit = 0; unit < units(); unit += kPanel, to += 256) {
                const int64_t corner = from + (turned ? unit * b_in + output : output * b_in + unit);
                for (int i = 0; i < 16; ++i)
                    read(data, corner + i * b_in, half, 16, (turned ? to : rows) + 16 * i);
                if (!turned) transpose(rows, 16, to, 16);
            }
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
    bool panels() const { return by_panel(b_out, b_in); }
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
