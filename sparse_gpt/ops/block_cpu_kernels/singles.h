// Weights by themselves, blocks of 1 x 1: products and gradients.
//
// A weight meets the 64 tokens of its input and no other weight does, so a pass lives on loads from
// L1: its inputs are those of a band that stays there, and what goes with a weight is five bytes.
// Rows of a band are worked on by their number of weights, fewest first: loops whose length stays
// are predicted, and two rows at once give sums enough to hide the latency of an addition.
#pragma once

#include "multiply.h"

// One weight of `Order`s whose blocks are 1 x 1, as a pass reads or writes it. Everything is by
// range of rows: a pass works on the ranges that were arranged.
struct Singles {
    struct Row {
        int32_t at, count;  // counted from the first of the range; its weights
    };
    Order order;
    int64_t rows, count;
    float* values;     // [count], those of the pass
    Row* sequence;     // [bands * rows]
    uint8_t* columns;  // [count], counted from the first of the band

    static int64_t floats(int64_t rows, int64_t count, int32_t bands) {
        return count + 2 * bands * rows + (count + 3) / 4;
    }

    Singles(const Order& order, int64_t rows, int64_t count, float* scratch)
        : order(order), rows(rows), count(count), values(scratch),
          sequence(reinterpret_cast<Row*>(scratch + count)),
          columns(reinterpret_cast<uint8_t*>(sequence + order.bands * rows)) {}

    // Calls each(where it lies in `values`, its place in the order) for weights of a band.
    template <typename Each>
    void visit(int32_t band, int64_t first, int64_t last, Each each) const {
        const int32_t* starts = order.starts + band * rows;
        int64_t at = starts[first];
        const Row* row = sequence + band * rows + first;
        for (int64_t i = first; i < last; ++i, ++row)
            for (int64_t b = starts[first + row->at], end = b + row->count; b < end; ++b)
                each(at++, b);
    }

    // The sequence and columns of a band of rows first .. last.
    void arrange(int32_t band, int64_t first, int64_t last) const {
        const int32_t* starts = order.starts + band * rows;
        Row* to = sequence + band * rows + first;
        int32_t places[258] = {};
        for (int64_t row = first; row < last; ++row) ++places[starts[row + 1] - starts[row] + 1];
        for (int i = 1; i < 258; ++i) places[i] += places[i - 1];
        for (int64_t row = first; row < last; ++row) {
            const int32_t length = starts[row + 1] - starts[row];
            to[places[length]++] = {static_cast<int32_t>(row - first), length};
        }
        const int32_t start = band * order.width;
        visit(band, first, last, [&](int64_t at, int64_t b) {
            columns[at] = static_cast<uint8_t>(order.columns[b] - start);
        });
    }

    // Its values, by slot in `data`.
    void read(int32_t band, int64_t first, int64_t last, const void* data, bool half) const {
        visit(band, first, last, [&](int64_t at, int64_t b) {
            const int32_t slot = order.slots[b];
            values[at] = half ? wide(static_cast<const uint16_t*>(data)[slot])
                              : static_cast<const float*>(data)[slot];
        });
    }

    void write(int32_t band, int64_t first, int64_t last, void* data, bool half) const {
        visit(band, first, last, [&](int64_t at, int64_t b) {
            const int32_t slot = order.slots[b];
            if (half)
                static_cast<uint16_t*>(data)[slot] = narrow(values[at]);
            else
                static_cast<float*>(data)[slot] = values[at];
        });
    }
};

constexpr int64_t kLine = 16;  // floats of a line of a cache

// What comes next, fetched into L2 a little at a time beside other work.
class Ahead {
public:
    // `lines` in all, in so many steps: `run` of them at `at`, as many `skip` floats on, and so on.
    Ahead(const float* at, int64_t run, int64_t skip, int64_t lines, int64_t steps)
        : at_(at), run_(run), skip_(skip), lines_(lines),
          each_((lines + steps - 1) / std::max<int64_t>(1, steps)) {}

    void step() {
        for (int64_t i = 0; i < each_ && done_ < lines_; ++i) {
            __builtin_prefetch(at_ + in_run_ * kLine, 0, 2);
            ++done_;
            if (++in_run_ == run_) in_run_ = 0, at_ += skip_;
        }
    }

private:
    const float* at_;
    int64_t run_, skip_, lines_, each_, done_ = 0, in_run_ = 0;
};

template <int V>
static inline void fetch(const float* at) {
    UNROLL
    for (int v = 0; v < V; ++v) __builtin_prefetch(at + v * kLanes, 0, 3);
}

// sums [R rows][V vectors] += weights * inputs of a band. The rows' weights follow one another, of
// each at least as many as of the one before.
template <int R, int V>
__attribute__((always_inline)) static inline void add_singles(const Singles::Row* row,
                                                              const float* weights,
                                                              const uint8_t* columns,
                                                              const float* x, float* sums) {
    Vec acc[R][V];
    const float* weight[R];
    const uint8_t* column[R];
    UNROLL
    for (int r = 0; r < R; ++r) {
        weight[r] = r ? weight[r - 1] + row[r - 1].count : weights;
        column[r] = r ? column[r - 1] + row[r - 1].count : columns;
        UNROLL
        for (int v = 0; v < V; ++v)
            acc[r][v] = load(sums + static_cast<int64_t>(row[r].at) * kTile + v * kLanes);
    }
    const auto add = [&](int r, int64_t i) {
        const float* in = x + static_cast<int64_t>(column[r][i]) * kTile;
        const Vec each = splat(weight[r][i]);
        UNROLL
        for (int v = 0; v < V; ++v) acc[r][v] = acc[r][v] + load(in + v * kLanes) * each;
    };
    const int64_t all = row[0].count;
    for (int64_t i = 0; i < all; ++i)
        UNROLL
        for (int r = 0; r < R; ++r) add(r, i);
    UNROLL
    for (int r = 1; r < R; ++r)
        for (int64_t i = all; i < row[r].count; ++i) add(r, i);
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int v = 0; v < V; ++v)
            store(sums + static_cast<int64_t>(row[r].at) * kTile + v * kLanes, acc[r][v]);
}

// sums [tiles][rows first .. last][64] += the weight's rows * its tiles.
template <int V>
static void add_single_rows(const Singles& s, int64_t first, int64_t last, int64_t tiles,
                            int passes, Tiles<const float> x, Tiles<float> sums) {
    constexpr int R = 2;
    const int64_t size = static_cast<int64_t>(s.order.width) * kTile, count = last - first;
    for (int32_t band = 0; band < s.order.bands; ++band) {
        const Singles::Row* rows = s.sequence + band * s.rows + first;
        const int64_t start = s.order.starts[band * s.rows + first];
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const float* near = x.data + tile * x.step + band * size;
            const float* next = tile + 1 < tiles ? near + x.step : x.data + (band + 1) * size;
            const bool end = tile + 1 == tiles && band + 1 == s.order.bands;
            Ahead ahead(next, size / kLine, 0, end ? 0 : size / kLine, count / R);
            for (int p = 0; p < passes; ++p) {
                const int64_t skip = p * V * kLanes;
                const float* in = near + skip;
                float* to = sums.data + tile * sums.step + skip;
                int64_t at = start, i = 0;
                for (; i + R <= count; i += R) {
                    ahead.step();
                    for (int64_t r = i + R; r < std::min(i + 2 * R, count); ++r)
                        fetch<V>(to + static_cast<int64_t>(rows[r].at) * kTile);
                    add_singles<R, V>(rows + i, s.values + at, s.columns + at, in, to);
                    for (int r = 0; r < R; ++r) at += rows[i + r].count;
                }
                for (; i < count; at += rows[i++].count)
                    add_singles<1, V>(rows + i, s.values + at, s.columns + at, in, to);
            }
        }
    }
}

static void add_single_rows(const Singles& s, int64_t first, int64_t last, int64_t tokens,
                            Tiles<const float> x, Tiles<float> sums) {
    const Span span = span_of(tokens);
    (span.few ? add_single_rows<1> : add_single_rows<kWays>)(s, first, last, span.tiles,
                                                             span.passes, x, sums);
}

// Tiles whose gradients of an output are held at once.
constexpr int kHeldTiles = kLanes == 16 ? 2 : 1;

// The values of a band of rows (+)= sums over G tiles of dy times x, whose features are the band's.
template <int G>
static void dot_singles(const Singles& s, int32_t band, int64_t first, int64_t last,
                        Tiles<const float> dy, Tiles<const float> x, bool add, Ahead ahead) {
    constexpr int V = kTile / kLanes;
    Vec found[16], *place = found;
    const int32_t start = s.order.starts[band * s.rows + first];
    const Singles::Row* row = s.sequence + band * s.rows + first;
    const uint8_t* column = s.columns + start;
    float* to = s.values + start;
    const auto put = [&](int count) {
        alignas(64) float sums[16];
        sum_lanes(found, false, sums);
        if (count == 16)
            for (int i = 0; i < 16; i += kLanes)
                store(to + i, add ? load(to + i) + load(sums + i) : load(sums + i));
        else
            for (int i = 0; i < count; ++i) to[i] = add ? to[i] + sums[i] : sums[i];
        to += count;
        place = found;
    };
    for (const Singles::Row* end = row + (last - first); row < end; ++row) {
        ahead.step();
        const float* out = dy.data + (first + row->at) * kTile;
        Vec left[G][V];
        UNROLL
        for (int g = 0; g < G; ++g) {
            if (row + 1 < end) fetch<V>(dy.data + (first + row[1].at) * kTile + g * dy.step);
            UNROLL
            for (int v = 0; v < V; ++v) left[g][v] = load(out + g * dy.step + v * kLanes);
        }
        for (const uint8_t* to_column = column + row->count; column < to_column; ++column) {
            const float* in = x.data + static_cast<int64_t>(*column) * kTile;
            Vec acc[2];
            UNROLL
            for (int g = 0; g < G; ++g) {
                const float* at = in + g * x.step;
                asm("" : "+r"(at));  // one register, no index: a load and its product stay one
                UNROLL
                for (int v = 0; v < V; ++v) {
                    const Vec product = left[g][v] * load(at + v * kLanes);
                    acc[v % 2] = g == 0 && v < 2 ? product : acc[v % 2] + product;
                }
            }
            *place++ = acc[0] + acc[1];
            if (place == found + 16) put(16);
        }
    }
    const int held = static_cast<int>(place - found);
    for (int i = held; i < 16; ++i) found[i] = Vec{};
    if (held) put(held);
}

// The gradients of rows first .. last: band after band, of which all tiles are gone through.
static void single_gradient(const Singles& s, int64_t first, int64_t last, int64_t tiles,
                            Tiles<const float> dy, Tiles<const float> x, bool add) {
    const int64_t size = static_cast<int64_t>(s.order.width) * kTile;
    for (int32_t band = 0; band < s.order.bands; ++band) {
        const float* near = x.data + band * size;
        for (int64_t tile = 0, count; tile < tiles; tile += count) {
            const bool many = tile + kHeldTiles <= tiles;
            count = many ? kHeldTiles : 1;
            // A tile of the next band comes near for each that is gone through.
            const int64_t lines = band + 1 < s.order.bands ? count * size / kLine : 0;
            (many ? dot_singles<kHeldTiles> : dot_singles<1>)(
                s, band, first, last, {dy.data + tile * dy.step, dy.step},
                {near + tile * x.step, x.step}, add || tile > 0,
                {near + size + tile * x.step, size / kLine, x.step, lines, last - first});
        }
    }
}
