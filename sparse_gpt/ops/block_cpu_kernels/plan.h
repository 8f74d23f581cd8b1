// A call as a list of work: weights to write in order, matrices to pack, products, gradients.
#pragma once

#include <vector>

#include "team.h"
#include "work.h"

constexpr int64_t kRangeSums = 2048;     // of 64 tokens, that a thread holds: 512 kB
constexpr int64_t kPanelSums = 768;      // the same where they are read once: 192 kB
constexpr int64_t kSlab = 256;           // features packed, or blocks written, at once
constexpr int64_t kSingleRows = 512;     // whose gradients stay in L2 for a sum over tokens
constexpr int64_t kNearSums = 160 << 10;  // of gradients, that stay in L2 from some tiles to the next
constexpr int64_t kNearInputs = 2048;    // features of a range of gradients
constexpr int64_t kNearWeights = 32 << 10;  // in order, that are written where they are used once
constexpr int64_t kNearFloats = 1 << 18;  // of tiles that stay in L2 beside sums
constexpr int64_t kTilesAtOnce = 4;      // that a weight meets when it comes by
constexpr int64_t kPartFloats = 4 << 20;  // that packed tiles may take, if kSumTiles fit

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
        for (const Packing& p : packings) step += p.step();
        tiles_ = std::min(tiles, std::max<int64_t>(kSumTiles, kPartFloats / std::max<int64_t>(1, step)));
        tiles_ = std::min(tiles, round_up(tiles_, kSumTiles));
        at_once_ = tiles_ == tiles;
        for (Packing& p : packings) {
            p.at = take(tiles_ * p.step());
            split(p.features, kSlab, &p - packings.data(), &packs_);
        }
        lay_out_products();
        lay_out_weights(take);
        for (int i = 0; i < threads; ++i) held_.push_back(take(range_floats_));
        std::vector<int64_t> at;
        for (Sum& s : sums) {
            if (s.values && s.single())
                at.push_back(take(Singles::floats(s.rows, s.blocks, s.order.bands)));
            else if (s.in_order())
                at.push_back(at_once_ ? -1 : take(s.blocks * s.b_out * s.b_in));
            else
                at.push_back(half && s.values ? take(s.blocks * s.b_out * s.b_in) : -1);
            at.push_back(half && s.bias ? take(s.rows * s.b_out) : -1);
            if (s.in_order()) {
                split_near(s, &s - sums.data());
                continue;
            }
            const int64_t rows = std::max<int64_t>(1, ceil_div(s.rows, 8 * threads));
            const size_t made = sum_ranges_.size();
            split(s.rows, s.single() ? std::min(rows, kSingleRows) : rows, &s - sums.data(),
                  &sum_ranges_);
            for (size_t i = made; i < sum_ranges_.size(); ++i)
                if (s.values && s.single()) arrange(nullptr, &s, sum_ranges_[i], s.order.bands);
        }
        for (int i = 0; i < threads; ++i) near_.push_back(take(near_sums_));
        base_ = scratch.floats(floats);
        for (const Product& p : products) {
            use_huge_pages(p.output.y, tokens * p.output.stride * (half ? 2 : 4));
            use_huge_pages(p.output.inputs, tokens * p.output.stride * (half ? 2 : 4));
        }
        for (size_t i = 0; i < sums.size(); ++i) {
            Sum& s = sums[i];
            use_huge_pages(s.values, s.blocks * s.b_out * s.b_in * (half ? 2 : 4));
            s.value_sums = at[2 * i] >= 0 ? base_ + at[2 * i]
                           : s.in_order() ? nullptr
                                          : static_cast<float*>(s.values);
            s.bias_sums = half ? base_ + at[2 * i + 1] : static_cast<float*>(s.bias);
        }
    }

    // Ranges of outputs: all of a panel, if there are panels enough for all threads.
    void lay_out_products() {
        int64_t outputs = 0;
        for (const Product& p : products) outputs += p.rows * p.b;
        int64_t inputs = 0;  // floats of a tile of a product
        for (const Product& p : products)
            for (const Term& term : p.terms)
                inputs = std::max(inputs, packings[term.packing].step());
        if (panels()) inputs = std::min(inputs, kTile * bands_features());
        const int64_t near = std::max<int64_t>(1, kNearFloats / std::max<int64_t>(1, inputs));
        const int64_t at_once = single() || panels() ? std::min(kTilesAtOnce, near) : kTilesAtOnce;
        panel_ = std::clamp<int64_t>(tiles_, 1, at_once);
        const auto count_panels = [this] { return ceil_div(std::max<int64_t>(1, tiles_), panel_); };
        // Fewer of them, where threads would have too little to share.
        while (panel_ > 1 && count_panels() * (outputs / kTile) < 4 * threads) panel_ = panel_ / 2;
        const int64_t panels = count_panels();
        const int64_t wanted = std::max<int64_t>(1, ceil_div(outputs * panels, 4 * threads));
        const int64_t sums = panels_once() ? kPanelSums : kRangeSums;
        const int64_t most = std::min(sums / panel_, round_up(wanted, 16));
        for (const Product& p : products) {
            const int64_t ranges = ceil_div(p.rows * p.b, std::max<int64_t>(most, 1));
            const int64_t even = std::min(most / p.b, ceil_div(p.rows, ranges));
            const int64_t rows = std::max<int64_t>(1, even);
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

    // Weights in order: all before products, or, where all tokens meet them at once, some as they are
    // needed.
    template <typename Take>
    void lay_out_weights(Take take) {
        as_needed_ = !single() && at_once_ && panel_ >= tiles_;
        int64_t near = as_needed_ && !values.empty() ? kNearWeights : 0;
        for (Values& v : values) {
            if (!as_needed_) v.at = take(v.floats());
            if (v.single()) continue;  // lay_out_products
            if (!as_needed_) {
                const int64_t slab = std::max<int64_t>(1, kSlab * 64 / v.a_block());
                split(v.blocks, slab, &v - values.data(), &writes_);
                continue;
            }
            int64_t longest = 0;  // row of a band
            for (int64_t row = 0; row < v.rows * v.order.bands; ++row)
                longest = std::max<int64_t>(longest, v.order.starts[row + 1] - v.order.starts[row]);
            near = std::max(near, longest * v.a_block());
        }
        near_weights_ = near;
        for (int i = 0; i < threads; ++i) weights_.push_back(take(near));
    }

    // Ranges of rows and bands whose gradients stay in L2, and whose inputs serve many rows.
    void split_near(const Sum& s, int64_t of) {
        const int64_t bands = std::max<int64_t>(1, s.order.bands), size = int64_t{s.b_out} * s.b_in;
        const int64_t wide = std::max<int64_t>(1, kNearInputs / (int64_t{s.order.width} * s.b_in));
        const int64_t step = ceil_div(bands, ceil_div(bands, wide));
        const int64_t a_row = std::max<int64_t>(1, s.blocks * size / s.rows * step / bands);
        const int64_t rows = std::max<int64_t>(1, ceil_div(s.rows, 8 * threads));
        const int64_t most = std::clamp<int64_t>(kNearSums / a_row, 1, rows);
        for (int64_t band = 0; band < bands; band += step)
            for (int64_t first = 0; first < s.rows; first += most) {
                const Range r{of, first, std::min(s.rows, first + most), static_cast<int32_t>(band),
                              static_cast<int32_t>(std::min(bands, band + step))};
                sum_ranges_.push_back(r);
                int64_t blocks = 0;
                for (int32_t b = r.first_band; b < r.last_band; ++b)
                    blocks += s.order.starts[b * s.rows + r.last] - s.order.starts[b * s.rows + first];
                if (at_once_) near_sums_ = std::max(near_sums_, blocks * size);
            }
    }

    bool single() const { return !values.empty() && values[0].single(); }
    bool panels() const { return !values.empty() && values[0].panels(); }

    // Whether what panels are multiplied into is of one band of one weight.
    bool panels_once() const {
        return panels() && values[0].order.bands == 1 && products[0].terms.size() == 1;
    }

    // Features of the widest band.
    int64_t bands_features() const {
        int64_t widest = 0;
        for (const Values& v : values) widest = std::max(widest, v.order.width * v.units());
        return widest;
    }

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
            const Values& v = values[r.of];
            v.write(r.first, r.last, base_ + v.at + r.first * v.a_block());
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
                      [&](int64_t i) { sum_up<Lane>(part, sum_ranges_[i], thread); });
        }
        team.each(static_cast<int64_t>(arrangements_.size()), [this](int64_t i) {
            const Arrangement& a = arrangements_[i];
            if (a.sum) a.sum->singles().write(a.band, a.first, a.last, a.sum->values, half);
        });
        team.each(count(sum_ranges_), [this](int64_t i) { put_sums(sum_ranges_[i]); });
    }

    // One range of the outputs of some tiles of the part that begins at `part`.
    template <typename Lane>
    void multiply(int64_t part, int64_t first, int64_t tiles, const Range& r, int thread) {
        const Product& p = products[r.of];
        const int64_t outputs = (r.last - r.first) * p.b;
        const int64_t start = (part + first) * kTile, end = std::min(tokens, start + tiles * kTile);
        if (panels()) return multiply_panels<Lane>(p, start, end, first, r, thread);
        const Tiles<float> sums{base_ + held_[thread], (outputs + 16) * kTile};
        if (single()) std::fill(sums.data, sums.data + tiles * sums.step, 0.0f);
        for (const Term& term : p.terms) {
            const Values& v = values[term.values];
            const Packing& x = packings[term.packing];
            const Tiles<const float> in{base_ + x.at + first * x.step(), x.step()};
            if (v.single()) {
                add_single_rows(v.singles(base_), r.first, r.last, end - start, in, sums);
                continue;
            }
            each_weights(v, p, r, in, thread, [&](const Weights& w, int32_t band, int64_t row, int64_t to) {
                const Tiles<float> at{sums.data + (row - r.first) * p.b * kTile, sums.step};
                add_rows<Lane>(w, band, row, to, end - start, band > 0 || &term != &p.terms[0], at);
            });
        }
        for (int64_t tile = 0; tile < tiles; ++tile)
            unpack(sums.data + tile * sums.step, r.first * p.b, outputs, start + tile * kTile,
                   tokens, p.output);
    }

    // The same of blocks that are multiplied by panels.
    template <typename Lane>
    void multiply_panels(const Product& p, int64_t start, int64_t end, int64_t first, const Range& r,
                         int thread) {
        float* sums = base_ + held_[thread];
        const int64_t room = round_up(end - start, kPanelTokens);
        const int64_t outputs = (r.last - r.first) * p.b;
        for (const Term& term : p.terms) {
            const Values& v = values[term.values];
            const Packing& x = packings[term.packing];
            const Tiles<const float> in{base_ + x.at + first * x.step(), x.step()};
            each_weights(v, p, r, in, thread, [&](const Weights& w, int32_t band, int64_t row, int64_t to) {
                for (; row < to; ++row) {
                    const int32_t* starts = v.order.starts + band * p.rows + row;
                    add_panels<Lane>(w, starts[0], starts[1], end - start, room,
                                     band > 0 || &term != &p.terms[0],
                                     sums + (row - r.first) * p.b * room);
                }
            });
        }
        put_panels(sums, r.first * p.b, outputs, start, end, room, p.output);
    }

    // Calls use(weights, band, block rows from .. to) for the rows of a range, band after band: of as
    // many rows at once as have their weights in order.
    template <typename Use>
    void each_weights(const Values& v, const Product& p, const Range& r, Tiles<const float> in,
                      int thread, Use use) {
        Weights w{v.order, base_ + v.at, 0, v.blocks, p.rows, p.b, static_cast<int32_t>(v.units()), in};
        for (int32_t band = 0; band < v.order.bands; ++band) {
            if (!as_needed_) {
                use(w, band, r.first, r.last);
                continue;
            }
            const int32_t* starts = v.order.starts + band * p.rows;
            float* near = base_ + weights_[thread];
            w.values = near;
            for (int64_t row = r.first, to; row < r.last; row = to) {
                for (to = row + 1; to < r.last; ++to)
                    if ((starts[to + 1] - starts[row]) * v.a_block() > near_weights_) break;
                w.from = starts[row], w.to = starts[to];
                v.write(w.from, w.to, near);
                use(w, band, row, to);
            }
        }
    }

    template <typename Lane>
    void sum_up(const Part& part, const Range& r, int thread) {
        const Sum& s = sums[r.of];
        const Packing& dy = packings[s.dy];
        const InOrder in_order{s.value_sums ? s.value_sums : base_ + near_[thread], !s.value_sums};
        for (int64_t tile = 0; tile < part.tiles; tile += kSumTiles) {
            const int64_t tiles = std::min<int64_t>(kSumTiles, part.tiles - tile);
            const bool add = part.start + tile > 0;
            const Tiles<const float> left{base_ + dy.at + dy.before_tokens() + tile * dy.step(),
                                          dy.step()};
            if (s.values) {
                const Packing& x = packings[s.x];
                const Tiles<const float> right{base_ + x.at + tile * x.step(), x.step()};
                const Gradient g{s.order, s.rows, s.b_out, s.b_in, left, right, tiles,
                                 s.value_sums, in_order, add, r.first_band, r.last_band};
                if (s.single())
                    single_gradient(s.singles(), r.first, r.last, tiles, left, right, add);
                else
                    add_gradient<Lane>(g, r.first, r.last);
            }
            if (s.bias && r.first_band == 0)
                (s.panels() ? sum_panels<Lane> : sum_tokens<Lane>)(
                    left, tiles, r.first * s.b_out, r.last * s.b_out, add, s.bias_sums);
        }
        if (s.in_order() && at_once_) s.put(in_order, r, half);
    }

    // Where it is to go, what a range of block rows has come to; of slots a share by position.
    void put_sums(const Range& r) {
        const Sum& s = sums[r.of];
        const auto round = [](const float* from, void* to, int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) static_cast<uint16_t*>(to)[i] = narrow(from[i]);
        };
        const int64_t numbers = s.blocks * s.b_out * s.b_in;
        if (s.in_order()) {
            if (!at_once_) s.put({s.value_sums, false}, r, half);
        } else if (half && s.values && !s.single())
            round(s.value_sums, s.values, numbers * r.first / s.rows, numbers * r.last / s.rows);
        if (half && s.bias && r.first_band == 0) round(s.bias_sums, s.bias, r.first * s.b_out, r.last * s.b_out);
    }

    int64_t tiles_ = 0;  // of a part
    int64_t panel_ = 1;  // tiles that are multiplied at once
    std::vector<Arrangement> arrangements_;
    std::vector<Range> writes_, packs_, ranges_, sum_ranges_;
    int64_t range_floats_ = 0;
    std::vector<int64_t> held_;  // where each thread's sums are
    bool at_once_ = false;       // all tokens are in one part
    bool as_needed_ = false;     // weights are put in order where they are used
    int64_t near_weights_ = 0, near_sums_ = 0;
    std::vector<int64_t> weights_, near_;  // where each thread has those
    float* base_ = nullptr;
};
