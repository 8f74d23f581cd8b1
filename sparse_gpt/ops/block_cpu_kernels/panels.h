// Products of blocks of multiples of 16: 16 outputs are the vector, and inputs the scalars.
//
// Inputs lie in panels, 16 features token after token (pack.h), so that what 16 tokens have of a
// block is near; weights lie as [outputs / 16][units][16]. Sums leave as rows, with no transposing.
#pragma once

#include "multiply.h"
#include "pack.h"
#include "scratch.h"

constexpr int kPanelTokens = kLanes == 16 ? 16 : 4;  // whose sums are held at once
constexpr int kPanelUnits = 128;  // of weights that stay in L1 while tokens come by
constexpr int kScattered = 32;    // units of a block whose inputs CPUs do not fetch ahead

// sums [tokens][16] += inputs of kPanelTokens tokens * blocks first .. last, for 16 outputs.
template <bool kFetch>
static inline void add_panel(const Weights& w, int64_t first, int64_t last, int output,
                             const float* x, float* sums) {
    constexpr int parts = kPanel / kLanes;
    const int panels = w.units / kPanel;
    const int64_t size = static_cast<int64_t>(w.outputs) * w.units;
    Vec acc[kPanelTokens][parts];
    UNROLL
    for (int t = 0; t < kPanelTokens; ++t)
        UNROLL
        for (int p = 0; p < parts; ++p) acc[t][p] = load(sums + t * kPanel + p * kLanes);
    for (int64_t b = first; b < last; ++b) {
        const float* weight = w.values + b * size + static_cast<int64_t>(output) * w.units;
        const float* in = x + static_cast<int64_t>(w.order.columns[b]) * w.units * kTile;
        const float* after =
            x + static_cast<int64_t>(w.order.columns[b + 1 < last ? b + 1 : b]) * w.units * kTile;
        for (int panel = 0; panel < panels; ++panel, in += kPanel * kTile, weight += kPanel * kPanel) {
            const float* next = panel + 1 < panels ? in + kPanel * kTile : after;
            UNROLL
            for (int u = 0; u < kPanel; ++u) {
                if (kFetch && u < kPanelTokens) __builtin_prefetch(next + u * kPanel);
                Vec each[parts];
                UNROLL
                for (int p = 0; p < parts; ++p) each[p] = load(weight + u * kPanel + p * kLanes);
                UNROLL
                for (int t = 0; t < kPanelTokens; ++t) {
                    const Vec scalar = splat(in[t * kPanel + u]);
                    UNROLL
                    for (int p = 0; p < parts; ++p) acc[t][p] = acc[t][p] + scalar * each[p];
                }
            }
        }
    }
    UNROLL
    for (int t = 0; t < kPanelTokens; ++t)
        UNROLL
        for (int p = 0; p < parts; ++p) store(sums + t * kPanel + p * kLanes, acc[t][p]);
}

// sums [outputs / 16][room][16] += blocks first .. last of a block row * the tiles of tokens.
static void add_panels(const Weights& w, int64_t first, int64_t last, int64_t tokens, int64_t room,
                       float* sums) {
    const int64_t size = static_cast<int64_t>(w.outputs) * w.units;
    const int64_t near = std::max(1, kPanelUnits / w.units);
    const int64_t blocks = w.order.starts[w.order.bands * w.rows];
    const int64_t groups = ceil_div(tokens, kPanelTokens);
    for (int64_t b = first; b < last; b += near) {
        const int64_t end = std::min(b + near, last);
        const float* next = w.values + end * size;  // weights are fetched while others are used
        const float* fetched = w.values + std::min(end + near, blocks) * size;
        const int64_t lines = ceil_div((fetched - next) / 16, groups);
        for (int64_t t = 0; t < groups * kPanelTokens; t += kPanelTokens) {
            for (int64_t i = 0; i < lines && next < fetched; ++i, next += 16)
                __builtin_prefetch(next, 0, 2);
            const float* x = w.x.data + t / kTile * w.x.step + t % kTile * kPanel;
            for (int output = 0; output < w.outputs; output += kPanel) {
                float* to = sums + (output * room / kPanel + t) * kPanel;
                (w.units <= kScattered ? add_panel<true> : add_panel<false>)(w, b, end, output, x, to);
            }
        }
    }
}

// sums [features / 16][room][16] -> features `first` and on of tokens start .. end.
static void put_panels(const float* sums, int64_t first, int64_t features, int64_t start,
                       int64_t end, int64_t room, const Output& out) {
    alignas(64) float rows[16 * kPanel];
    for (int64_t from = start; from < end; from += 16)
        for (int64_t f = 0; f < features; f += kPanel) {
            const int64_t count = std::min<int64_t>(16, end - from);
            std::memcpy(rows, sums + (f / kPanel * room + from - start) * kPanel, count * kPanel * 4);
            for (int i = 0; i < count; ++i)
                put_row(rows + i * kPanel, from + i, first + f, kPanel, out);
        }
}
