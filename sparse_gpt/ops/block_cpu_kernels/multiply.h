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
};

// A weight [rows * outputs, columns * units] for sums over its columns.
struct Weights {
    Order order;
    const float* values;  // [blocks][outputs][units], or [blocks][units][outputs] if `turned`
    const int32_t* slots;  // of each block in order; null where the values are in order
    int64_t rows;          // block rows
    int32_t outputs, units;
    bool turned;
    const float* x;  // a packed tile [columns * units][64]
};

constexpr int kWays = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 4;  // vectors of tokens held at once
constexpr int kNear = 96;  // units of a tile that stay in L1 beside the sums: 24 kB

// sums [R outputs][64] += weights of `count` blocks * x, for V vectors of tokens.
template <typename Lane, int R, int V, int U, bool turned>
static inline void add_blocks(const Weights& w, int64_t from, int64_t count, int output,
                              const float* x, float* sums) {
    const int units = U ? U : w.units;
    const int64_t size = static_cast<int64_t>(w.outputs) * units;
    const int64_t r_step = turned ? 1 : units, u_step = turned ? w.outputs : 1;
    Vec acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = load(sums + r * kTile + v * kLanes);
    for (int64_t b = from; b < from + count; ++b) {
        const int64_t slot = w.slots ? w.slots[b] : b;
        const float* weight = w.values + slot * size + output * r_step;
        const float* at = x + static_cast<int64_t>(w.order.columns[b]) * units * kTile;
        for (int u = 0; u < units; ++u) {
            Vec in[V];
            for (int v = 0; v < V; ++v) in[v] = load(at + u * kTile + v * kLanes);
            for (int r = 0; r < R; ++r) {
                const Vec each = splat(weight[r * r_step + u * u_step]);
                for (int v = 0; v < V; ++v) acc[r][v] = Lane::dot(acc[r][v], in[v], each);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(sums + r * kTile + v * kLanes, acc[r][v]);
}

// sums [outputs of block rows first .. last][64] += the weight's rows * its tile.
template <typename Lane, int R, int V, int U, bool turned>
static void add_rows_as(const Weights& w, int64_t first, int64_t last, int passes, float* sums) {
    const int64_t near = std::max(1, kNear / w.units);
    for (int32_t band = 0; band < w.order.bands; ++band)
        for (int64_t row = first; row < last; ++row) {
            const int32_t* starts = w.order.starts + band * w.rows + row;
            float* row_sums = sums + (row - first) * w.outputs * kTile;
            for (int64_t b = starts[0]; b < starts[1]; b += near) {
                const int64_t count = std::min<int64_t>(near, starts[1] - b);
                for (int output = 0; output < w.outputs; output += R)
                    for (int p = 0; p < passes; ++p)
                        add_blocks<Lane, R, V, U, turned>(w, b, count, output,
                                                          w.x + p * V * kLanes,
                                                          row_sums + output * kTile + p * V * kLanes);
            }
        }
}

template <typename Lane, int R, int V>
static void add_rows_by(const Weights& w, int64_t first, int64_t last, int passes, float* sums) {
    if (w.units == 1) return add_rows_as<Lane, R, V, 1, false>(w, first, last, passes, sums);
    if (w.turned) {
        if (w.units == 4) return add_rows_as<Lane, R, V, 4, true>(w, first, last, passes, sums);
        return add_rows_as<Lane, R, V, 0, true>(w, first, last, passes, sums);
    }
    if (w.units == 4) return add_rows_as<Lane, R, V, 4, false>(w, first, last, passes, sums);
    return add_rows_as<Lane, R, V, 0, false>(w, first, last, passes, sums);
}

// `tokens`: of the tile; sums of others are not made.
template <typename Lane>
static void add_rows(const Weights& w, int64_t first, int64_t last, int64_t tokens, float* sums) {
    const bool few = tokens <= 2 * kLanes;
    const int width = (few ? 1 : kWays) * kLanes;
    const int passes = static_cast<int>((std::min<int64_t>(tokens, kTile) + width - 1) / width);
    if (w.outputs % 4 == 0)
        few ? add_rows_by<Lane, 4, 1>(w, first, last, passes, sums)
            : add_rows_by<Lane, 4, kWays>(w, first, last, passes, sums);
    else if (w.outputs % 2 == 0)
        few ? add_rows_by<Lane, 2, 1>(w, first, last, passes, sums)
            : add_rows_by<Lane, 2, kWays>(w, first, last, passes, sums);
    else
        few ? add_rows_by<Lane, 1, 1>(w, first, last, passes, sums)
            : add_rows_by<Lane, 1, kWays>(w, first, last, passes, sums);
}

// Tiles whose features [features][width] lie `step` floats from one tile to the next.
struct Tiles {
    const float* data;
    int64_t step;
};

// The gradient of a weight's blocks: sums over tokens of dy [outputs] x [inputs].
struct Gradient {
    Order order;
    int64_t rows;  // block rows
    int32_t outputs, inputs;  // of a block
    Tiles dy, x;
    int64_t tiles;
    float* values;  // [blocks][outputs][inputs], by slot
    bool add;       // to what is there
};

// Sixteen sums over tokens: sums[r * C + c] of dy row r and the input at x[c]; R * C is 16.
template <typename Lane, int R, int C>
static inline void dot_tokens(const Gradient& g, const float* dy, const float* const* x,
                              float* sums) {
    constexpr int width = kTile / Lane::kPerUnit;
    Vec acc[R * C] = {};
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
        const float* rows = dy + tile * g.dy.step;
        const int64_t skip = tile * g.x.step;
        for (int v = 0; v < width; v += kLanes) {
            Vec left[R];
            for (int r = 0; r < R; ++r) left[r] = load(rows + r * width + v);
            for (int c = 0; c < C; ++c) {
                const Vec right = load(x[c] + skip + v);
                for (int r = 0; r < R; ++r)
                    acc[r * C + c] = Lane::dot(acc[r * C + c], left[r], right);
            }
        }
    }
    sum_lanes(acc, sums);
}

// Block rows first .. last of all bands.
template <typename Lane, int R, int C>
static void outer_rows_as(const Gradient& g, int64_t first, int64_t last) {
    constexpr int width = kTile / Lane::kPerUnit;
    float sums[16];
    const float* x[C];
    float* to[C];
    for (int32_t band = 0; band < g.order.bands; ++band)
        for (int64_t row = first; row < last; ++row) {
            const int32_t* starts = g.order.starts + band * g.rows + row;
            const int64_t columns = static_cast<int64_t>(starts[1] - starts[0]) * g.inputs;
            const float* dy = g.dy.data + row * g.outputs * width;
            for (int64_t column = 0; column < columns; column += C) {
                for (int c = 0; c < C; ++c) {  // of one block, or of several
                    const int64_t at = std::min<int64_t>(column + c, columns - 1);
                    const int64_t block = starts[0] + at / g.inputs, input = at % g.inputs;
                    x[c] = g.x.data + (g.order.columns[block] * static_cast<int64_t>(g.inputs) +
                                       input) * width;
                    to[c] = g.values + static_cast<int64_t>(g.order.slots[block]) * g.outputs *
                                           g.inputs + input;
                }
                const int count = static_cast<int>(std::min<int64_t>(C, columns - column));
                for (int output = 0; output < g.outputs; output += R) {
                    dot_tokens<Lane, R, C>(g, dy + output * width, x, sums);
                    for (int r = 0; r < R; ++r)
                        for (int c = 0; c < count; ++c) {
                            float* value = to[c] + (output + r) * g.inputs;
                            *value = g.add ? *value + sums[r * C + c] : sums[r * C + c];
                        }
                }
            }
        }
}

template <typename Lane>
static void outer_rows(const Gradient& g, int64_t first, int64_t last) {
    if (g.outputs % 4 == 0) return outer_rows_as<Lane, 4, 4>(g, first, last);
    if (g.outputs % 2 == 0) return outer_rows_as<Lane, 2, 8>(g, first, last);
    outer_rows_as<Lane, 1, 16>(g, first, last);
}

// sums [rows] (+)= the sum over tokens of each row of dy.
template <typename Lane>
static void sum_tokens(const Tiles& dy, int64_t tiles, int64_t first, int64_t last, bool add,
                       float* sums) {
    constexpr int width = kTile / Lane::kPerUnit;
    const Vec one = splat(Lane::ones());
    for (int64_t row = first; row < last; ++row) {
        Vec acc = {};
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int v = 0; v < width; v += kLanes)
                acc = Lane::dot(acc, load(dy.data + tile * dy.step + row * width + v), one);
        float sum = add ? sums[row] : 0.0f;
        for (int l = 0; l < kLanes; ++l) sum += acc[l];
        sums[row] = sum;
    }
}
