// SnapKV (arXiv 2404.14469): the attention of the window. Official SnapKV pools with a maximum over 7 in its LongBench settings
// and with a mean over 5 by default; we take the former, as Ada-KV, PyramidKV and LU-KV do.

#include "engine/policies/blocks.h"

namespace laprox::policies {

extern const scorer snapkv {
    .name   = "snapkv",
    .paper  = "2404.14469",
    .needs  = need::window,
    .graph  = mean_attention,
    .pool   = pooling::max,
    .kernel = 7,
};

}
