// The attention output projection W_O, as scorers need it: W_h is the slice that query head h uses, and norms of
// projected values need no projecting: ||v W_h||^2 = v^T G_h v with G_h = W_h W_h^T.

#pragma once

#include <cstdint>
#include <vector>

namespace laprox {

class workbench;

// W_O of a layer as float32 rows: [n_head*d_v, n_embd], W_h being d_v of them. Valid until it is asked of another layer.
const std::vector<float> & output_rows(workbench & bench, uint32_t il);

// G_h of every query head of a layer: float32 [n_head, d_v, d_v]. Computed once per model.
const std::vector<float> & output_grams(workbench & bench, uint32_t il);

// The same for values that llama.cpp rotated before quantising them: R G R, R a block-diagonal Hadamard matrix.
std::vector<float> rotated_gram(const float * gram, int64_t d_v);

// Multiply a row by R in place (R is its own inverse). `block`: the size of its blocks.
void hadamard_rotate(float * row, int64_t n, int64_t block);

// R itself, one block: [block, block].
std::vector<float> hadamard_matrix(int64_t block);

// llama.cpp rotates values in blocks of 64, and keys in the largest power of two that divides the head size.
int64_t rotation_block_v(int64_t d_v);
int64_t rotation_block_k(int64_t d_k);

}
