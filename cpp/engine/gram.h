// Norms of projected values without projecting them: ||v W_h||^2 = v^T G_h v with G_h = W_h W_h^T, where W_h is
// the slice of the attention output projection that query head h uses.

#pragma once

#include <cstdint>
#include <vector>

namespace laprox {

class workbench;

// G_h of every query head of a layer: float32 [n_head, d_v, d_v]. Computed once per model.
const std::vector<float> & output_grams(workbench & bench, uint32_t il);

// The same for values that llama.cpp rotated before quantising them: R G R, R a block-diagonal Hadamard matrix.
std::vector<float> rotated_gram(const float * gram, int64_t d_v);

// Multiply a row by R in place (R is its own inverse). `block`: the size of its blocks.
void hadamard_rotate(float * row, int64_t n, int64_t block);

// llama.cpp rotates values in blocks of 64, and keys in the largest power of two that divides the head size.
int64_t rotation_block_v(int64_t d_v);
int64_t rotation_block_k(int64_t d_k);

}
