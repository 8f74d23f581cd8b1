// Sums over tokens: the gradients of a weight's blocks, and of a bias.
//
// Blocks of multiples of 16 are sums of outer products, 16 outputs x 16 inputs at once: inputs lie
// in panels, [features / 16][tokens][16], and gradients of outputs, too, are scalars that meet them.
// Others are dot products along the tokens of tiles, sixteen at once.
#pragma once

#include "pack.h"
#include "singles.h"

// Sums of blocks in their order: of all blocks, or of some rows and bands alone, band after band.
struct InOrder {
    float* data;
    bool alone;

    // Where those of rows first .. last of a band begin; if alone, bands are asked for in turn.
    float* band(const Order& order, int64_t rows, int32_t band, int64_t first, int64_t last,
                int64_t size) {
        const int32_t* starts = order.starts + band * rows;
        if (!alone) return data + starts[first] * size;
        float* begin = data;
        data += (starts[last] - starts[first]) * size;
        return begin;
    }
};

struct Gradient {
    Order order;
    int64_t rows;             // block rows
    int32_t outputs, inputs;  // of a block
    Tiles<const float> dy;    // packed: in panels if `by_panel`, or [rows * outputs][width]
    Tiles<const float> x;     // the same of inputs
    int64_t tiles;
    float* values;  // [blocks][outputs][inputs], by slot, or
    InOrder sums;   // of quads and panels
    bool add;       // to what is there
    int32_t first_band, last_band;  // that are gone through; of quads and panels
};

// R outputs x P * 16 inputs of a block, `to` between whose rows lie `inputs` values.
template <typename Lane, int R, int P>
static inline void outer_products(const Gradient& g, const float* dy, const float* x, float* to) {
    constexpr int width = kTile / Lane::kPerUnit, parts = kPanel / kLanes;
    constexpr int next_panel = kPanel * width;
    Vec acc[R][P * parts];
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int p = 0; p < P * parts; ++p) acc[r][p] = Vec{};
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
        const float* left = dy + tile * g.dy.step;
        const float* right = x + tile * g.x.step;
        for (int t = 0; t < width; t += 16)
            UNROLL
            for (int u = 0; u < 16; ++u, left += kPanel, right += kPanel) {
                Vec in[P * parts];
                UNROLL
                for (int p = 0; p < P * parts; ++p)
                    in[p] = load(right + p / parts * next_panel + p % parts * kLanes);
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const Vec each = splat(left[r]);
                    UNROLL
                    for (int p = 0; p < P * parts; ++p)
                        acc[r][p] = Lane::dot(acc[r][p], in[p], each);
                }
            }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P * parts; ++p) {
            float* at = to + static_cast<int64_t>(r) * g.inputs + p * kLanes;
            store(at, g.add ? load(at) + acc[r][p] : acc[r][p]);
        }
}

// Block rows first .. last of all bands, of blocks of multiples of 16, P panels of inputs at once.
template <typename Lane, int P>
static void outer_rows_as(const Gradient& g, int64_t first, int64_t last) {
    constexpr int width = kTile / Lane::kPerUnit;
    constexpr int R = kLanes == 16 ? 16 / P : 4;
    const int64_t size = static_cast<int64_t>(g.outputs) * g.inputs;
    InOrder sums = g.sums;
    for (int32_t band = g.first_band; band < g.last_band; ++band) {
        float* to = sums.band(g.order, g.rows, band, first, last, size);
        for (int64_t row = first; row < last; ++row) {
            const int32_t* starts = g.order.starts + band * g.rows + row;
            const float* dy = g.dy.data + row * g.outputs * width;
            for (int64_t b = starts[0]; b < starts[1]; ++b, to += size) {
                const float* x = g.x.data + static_cast<int64_t>(g.order.columns[b]) * g.inputs * width;
                for (int input = 0; input < g.inputs; input += P * kPanel)
                    for (int output = 0; output < g.outputs; output += R) {
                        const int panel = output / kPanel * kPanel;
                        outer_products<Lane, R, P>(g, dy + panel * width + (output - panel),
                                                   x + input * width,
                                                   to + static_cast<int64_t>(output) * g.inputs + input);
                    }
            }
        }
    }
}

// Two panels at once load less for each product, with half as many outputs.
template <typename Lane>
static void outer_rows(const Gradient& g, int64_t first, int64_t last) {
    const bool two = kLanes == 16 && g.inputs % (2 * kPanel) == 0;
    (two ? outer_rows_as<Lane, 2> : outer_rows_as<Lane, 1>)(g, first, last);
}

// Sixteen sums over tokens: sums[r * C + c] of dy row r and the input at x[c]; R * C is 16.
template <typename Lane, int R, int C>
static inline void dot_tokens(const Gradient& g, const float* dy, const float* const* x,
                              float* sums) {
    constexpr int width = kTile / Lane::kPerUnit;
    Vec acc[R * C];
    UNROLL
    for (int i = 0; i < R * C; ++i) acc[i] = Vec{};
    for (int64_t tile = 0; tile < g.tiles; ++tile) {
        const float* rows = dy + tile * g.dy.step;
        const int64_t skip = tile * g.x.step;
        UNROLL
        for (int v = 0; v < width; v += kLanes) {
            Vec left[R];
            UNROLL
            for (int r = 0; r < R; ++r) left[r] = load(rows + r * width + v);
            UNROLL
            for (int c = 0; c < C; ++c) {
                const Vec right = load(x[c] + skip + v);
                UNROLL
                for (int r = 0; r < R; ++r)
                    acc[r * C + c] = Lane::dot(acc[r * C + c], left[r], right);
            }
        }
    }
    sum_lanes(acc, false, sums);
}

// The same of 4 rows of dy and 4 of x, which are neighbours: added to sums [4][4] if `add`. T tiles,
// or as many as there are.
template <typename Lane, int T>
static inline void dot_quad(const Gradient& g, const float* dy, const float* x, float* sums) {
    constexpr int width = kTile / Lane::kPerUnit;
    const int64_t dy_step = g.dy.step, x_step = g.x.step;
    Vec acc[16];
    UNROLL
    for (int i = 0; i < 16; ++i) acc[i] = Vec{};
    const auto add_tile = [&] {
        UNROLL
        for (int v = 0; v < width; v += kLanes) {
            Vec left[4];
            UNROLL
            for (int r = 0; r < 4; ++r) left[r] = load(dy + r * width + v);
            UNROLL
            for (int c = 0; c < 4; ++c) {
                const Vec right = load(x + c * width + v);
                UNROLL
                for (int r = 0; r < 4; ++r) acc[r * 4 + c] = Lane::dot(acc[r * 4 + c], left[r], right);
            }
        }
        dy += dy_step, x += x_step;
    };
    if (T)
        UNROLL
        for (int tile = 0; tile < T; ++tile) add_tile();
    else
        for (int64_t tile = g.tiles; tile > 0; --tile) add_tile();
    sum_lanes(acc, g.add, sums);
}

constexpr int kSumTiles = 4;  // that one sum over tokens runs through: inputs stay in L1

// Block rows first .. last of all bands, of blocks of multiples of 4: 4 x 4 sums at once, which lie
// in order, as [outputs / 4][inputs / 4][4][4] a block. B is the blocks' side, or 0 for any.
template <typename Lane, int B, int T>
static void quad_rows_as(const Gradient& g, int64_t first, int64_t last) {
    constexpr int width = kTile / Lane::kPerUnit;
    const int outputs = B ? B : g.outputs, inputs = B ? B : g.inputs;
    const int64_t size = static_cast<int64_t>(outputs) * inputs;
    const int32_t* columns = g.order.columns;
    InOrder sums = g.sums;
    for (int32_t band = g.first_band; band < g.last_band; ++band) {
        float* to = sums.band(g.order, g.rows, band, first, last, size);
        for (int64_t row = first; row < last; ++row) {
            const int32_t* starts = g.order.starts + band * g.rows + row;
            const float* dy = g.dy.data + row * outputs * width;
            for (int64_t b = starts[0], end = starts[1]; b < end; ++b) {
                const float* x = g.x.data + static_cast<int64_t>(columns[b]) * inputs * width;
                for (int output = 0; output < outputs; output += 4)
                    for (int input = 0; input < inputs; input += 4, to += 16) {
                        __builtin_prefetch(to + 64, 1);
                        dot_quad<Lane, T>(g, dy + output * width, x + input * width, to);
                    }
            }
        }
    }
}

template <typename Lane>
static void quad_rows(const Gradient& g, int64_t first, int64_t last) {
    const auto rows = [&](auto of_four, auto of_any) {
        (g.outputs == 4 && g.inputs == 4 ? of_four : of_any)(g, first, last);
    };
    if (g.tiles == kSumTiles)
        rows(quad_rows_as<Lane, 4, kSumTiles>, quad_rows_as<Lane, 0, kSumTiles>);
    else
        rows(quad_rows_as<Lane, 4, 0>, quad_rows_as<Lane, 0, 0>);
}

// The same of any blocks: columns are those of one block or of several, as it comes.
template <typename Lane, int R, int C>
static void dot_any_rows(const Gradient& g, int64_t first, int64_t last) {
    constexpr int width = kTile / Lane::kPerUnit;
    float sums[16];
    const float* x[C];
    float* to[C];
    for (int32_t band = 0; band < g.order.bands; ++band)
        for (int64_t row = first; row < last; ++row) {
            const int32_t* starts = g.order.starts + band * g.rows + row;
            const int64_t columns = static_cast<int64_t>(starts[1] - starts[0]) * g.inputs;
            const float* dy = g.dy.data + row * g.outputs * width;
            int64_t block = starts[0];
            int32_t input = 0;
            for (int64_t column = 0; column < columns; column += C) {
                const int count = static_cast<int>(std::min<int64_t>(C, columns - column));
                for (int c = 0; c < C; ++c) {
                    if (c < count) {
                        const int64_t at = g.order.columns[block] * static_cast<int64_t>(g.inputs);
                        x[c] = g.x.data + (at + input) * width;
                        to[c] = g.values + static_cast<int64_t>(g.order.slots[block]) * g.outputs *
                                               g.inputs + input;
                        if (++input == g.inputs) ++block, input = 0;
                    } else {
                        x[c] = x[0];
                    }
                }
                for (int output = 0; output < g.outputs; output += R) {
                    for (int64_t r = output; r < output + R; ++r)
                        for (int c = 0; c < count; ++c) __builtin_prefetch(to[c] + r * g.inputs, 1);
                    dot_tokens<Lane, R, C>(g, dy + output * width, x, sums);
                    for (int r = 0; r < R; ++r)
                        for (int c = 0; c < count; ++c) {
                            float* value = to[c] + static_cast<int64_t>(output + r) * g.inputs;
                            *value = g.add ? *value + sums[r * C + c] : sums[r * C + c];
                        }
                }
            }
        }
}

template <typename Lane>
static void add_gradient(const Gradient& g, int64_t first, int64_t last) {
    if (by_panel(g.outputs, g.inputs, Lane::kPerUnit == 2)) return outer_rows<Lane>(g, first, last);
    if (g.outputs % 4 == 0 && g.inputs % 4 == 0) return quad_rows<Lane>(g, first, last);
    if (g.outputs % 4 == 0) return dot_any_rows<Lane, 4, 4>(g, first, last);
    if (g.outputs % 2 == 0) return dot_any_rows<Lane, 2, 8>(g, first, last);
    dot_any_rows<Lane, 1, 16>(g, first, last);
}

// sums [rows] (+)= the sum over tokens of each row of dy.
template <typename Lane>
static void sum_tokens(const Tiles<const float>& dy, int64_t tiles, int64_t first, int64_t last, bool add,
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

// The same of 16 rows that are a panel.
template <typename Lane>
static void sum_panels(const Tiles<const float>& dy, int64_t tiles, int64_t first, int64_t last, bool add,
                       float* sums) {
    constexpr int width = kTile / Lane::kPerUnit, ways = 4;
    const Vec one = splat(Lane::ones());
    for (int64_t row = first; row < last; row += kPanel)
        for (int p = 0; p < kPanel; p += kLanes) {
            Vec acc[ways] = {};
            for (int64_t tile = 0; tile < tiles; ++tile)
                for (int t = 0; t < width; t += ways)
                    UNROLL
                    for (int w = 0; w < ways; ++w)
                        acc[w] = Lane::dot(
                            acc[w], load(dy.data + tile * dy.step + row * width + (t + w) * kPanel + p),
                            one);
            const Vec sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
            store(sums + row + p, add ? load(sums + row + p) + sum : sum);
        }
}
