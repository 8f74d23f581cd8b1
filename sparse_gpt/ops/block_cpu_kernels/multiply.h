// The products over packed tiles: sums over a block row, and sums over tokens.
//
// Lane is Floats or Pairs; a unit is what a lane holds, one number or a pair, and counts of
// features that are summed over are in units here.
#pragma once

#include <algorithm>

#include "lanes.h"

// The blocks of a weight, or of its transpose, in the order of one pass: bands of columns, block
// rows in a band, columns in a row.
struct Order {
    const int32_t* starts;   // [bands * rows + 1]: where each block row of each band begins
    const int32_t* columns;  // [blocks]
    const int32_t* slots;    // [blocks]
    int32_t bands;
    int32_t width;           // columns of a band
};

// Tiles of 64 tokens, or sums for them, that lie `step` floats from one to the next.
template <typename Float>
struct Tiles {
    Float* data;
    int64_t step;
};

// Outputs of a block whose sums are held at once.
static inline int outputs_at_once(int outputs) {
    return outputs % 4 == 0 ? 4 : outputs % 2 == 0 ? 2 : 1;
}

// A weight [rows * outputs, columns * units] for sums over its columns.
struct Weights {
    Order order;
    const float* values;  // in order: [blocks][outputs / R][units][R], R outputs_at_once
    int64_t from, to;     // the blocks that `values` holds
    int64_t rows;         // block rows
    int32_t outputs, units;
    Tiles<const float> x;  // packed, [columns * units][64]
};

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int kWays = 4;   // vectors of tokens held at once
constexpr int kNear = 96;  // units of a tile that stay in L1 beside weights and sums: 24 kB

// How `tokens` tokens are gone through; of others in the last tile sums are made, too.
struct Span {
    int64_t tiles;
    bool few;    // one vector of tokens at once, not kWays
    int passes;  // through a tile
};

static inline Span span_of(int64_t tokens) {
    const bool few = tokens <= 2 * kLanes;
    const int width = (few ? 1 : kWays) * kLanes;
    return {(tokens + kTile - 1) / kTile, few,
            static_cast<int>((std::min<int64_t>(tokens, kTile) + width - 1) / width)};
}

// sums [R outputs][64] (+)= weights of blocks first .. last * x, for V vectors of tokens.
template <typename Lane, int R, int V, int U>
static inline void add_blocks(const Weights& w, int64_t first, int64_t last, int output,
                              const float* x, bool add, float* sums) {
    const int units = U ? U : w.units;
    const int64_t size = static_cast<int64_t>(w.outputs) * units;
    const float* weight = w.values + (first - w.from) * size + output * units;
    Vec acc[R][V];
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < V; ++v) acc[r][v] = Vec{};
    if (add)
        UNROLL
        for (int r = 0; r < R; ++r)
            UNROLL
            for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * kTile + v * kLanes);
    for (int64_t b = first; b < last; ++b, weight += size) {
        const float* in = x + static_cast<int64_t>(w.order.columns[b]) * units * kTile;
        for (int u = 0; u < units; ++u)
            UNROLL
            for (int r = 0; r < R; ++r) {
                const Vec each = splat(weight[u * R + r]);
                UNROLL
                for (int v = 0; v < V; ++v)
                    acc[r][v] = Lane::dot(acc[r][v], load(in + u * kTile + v * kLanes), each);
            }
    }
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < V; ++v) store(sums + r * kTile + v * kLanes, acc[r][v]);
}

// sums [tiles][outputs of block rows first .. last][64] (+)= the weight's rows of a band * its tiles.
template <typename Lane, int R, int V, int U>
static void add_rows_as(const Weights& w, int32_t band, int64_t first, int64_t last,
                        const Span& span, bool add, Tiles<float> sums) {
    const auto sum = [&](int64_t row, int64_t from, int64_t to, int64_t tile, bool more) {
        const float* x = w.x.data + tile * w.x.step;
        float* to_sums = sums.data + tile * sums.step + (row - first) * w.outputs * kTile;
        for (int output = 0; output < w.outputs; output += R)
            for (int p = 0; p < span.passes * V * kLanes; p += V * kLanes)
                add_blocks<Lane, R, V, U>(w, from, to, output, x + p, more,
                                          to_sums + output * kTile + p);
    };
    const int64_t near = std::max(1, kNear / w.units);
    const int32_t* starts = w.order.starts + band * w.rows;
    if (w.outputs <= R) {  // inputs are used once a row: the band is to stay in L1
        for (int64_t tile = 0; tile < span.tiles; ++tile)
            for (int64_t row = first; row < last; ++row)
                sum(row, starts[row], starts[row + 1], tile, add);
        return;
    }
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = starts[row], end = starts[row + 1];
        for (int64_t b = begin; b == begin || b < end; b += near)
            for (int64_t tile = 0; tile < span.tiles; ++tile)
                sum(row, b, std::min(b + near, end), tile, add || b > begin);
    }
}

template <typename Lane, int R, int V>
static void add_rows_by(const Weights& w, int32_t band, int64_t first, int64_t last,
                        const Span& span, bool add, Tiles<float> sums) {
    const auto by = [&](auto rows) { rows(w, band, first, last, span, add, sums); };
    switch (w.units) {
        case 1: return by(add_rows_as<Lane, R, V, 1>);
        case 2: return by(add_rows_as<Lane, R, V, 2>);
        case 4: return by(add_rows_as<Lane, R, V, 4>);
        case 8: return by(add_rows_as<Lane, R, V, 8>);
        default: return by(add_rows_as<Lane, R, V, 0>);
    }
}

// Sums for `tokens` tokens, or what is to be added to those there are.
template <typename Lane>
static void add_rows(const Weights& w, int32_t band, int64_t first, int64_t last, int64_t tokens,
                     bool add, Tiles<float> sums) {
    const Span span = span_of(tokens);
    const auto sum = [&](auto by, auto by_one) {
        (span.few ? by_one : by)(w, band, first, last, span, add, sums);
    };
    switch (outputs_at_once(w.outputs)) {
        case 4: return sum(add_rows_by<Lane, 4, kWays>, add_rows_by<Lane, 4, 1>);
        case 2: return sum(add_rows_by<Lane, 2, kWays>, add_rows_by<Lane, 2, 1>);
        default: return sum(add_rows_by<Lane, 1, kWays>, add_rows_by<Lane, 1, 1>);
    }
}
