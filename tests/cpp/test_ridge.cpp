// Ridge regression: what is solved fits its equations, whatever the shape, and where they are as good as singular.

#include "check.h"

#include "core/ridge.h"

#include <algorithm>
#include <cmath>
#include <vector>

static float random_number() {
    return (float) below(2001)/1000.0f - 1.0f;
}

// X^T X of random rows
static std::vector<float> random_gram(int64_t n, int64_t n_rows) {
    std::vector<float> x(n*n_rows), gram(n*n);
    for (float & number : x) {
        number = random_number();
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t row = 0; row < n_rows; row++) {
                sum += (double) x[row*n + i]*x[row*n + j];
            }
            gram[i*n + j] = (float) sum;
        }
    }
    return gram;
}

int main() {
    for (int round = 0; round < 300; round++) {
        const bool    large = round % 10 == 0; // several blocks of columns, and of right sides
        const int64_t n = 1 + below(large ? 200 : 70), n_right = below(large ? 40 : 4);
        // from one row, rank 1, to many
        const auto   gram  = random_gram(n, 1 + below(3)*below(60));
        const double ridge = std::pow(10.0, below(5) - 2);
        std::vector<float> right(n*n_right);
        for (float & number : right) {
            number = random_number();
        }
        const auto x = laprox::solve_ridge(gram, n, ridge, right);
        CHECK(x.size() == right.size());
        for (int64_t side = 0; side < n_right; side++) {
            double size = 1.0;
            for (int64_t i = 0; i < n; i++) {
                size = std::max(size, std::abs((double) x[side*n + i]));
            }
            for (int64_t i = 0; i < n; i++) {
                double left = ridge*x[side*n + i];
                for (int64_t j = 0; j < n; j++) {
                    left += (double) gram[i*n + j]*x[side*n + j];
                }
                CHECK(std::abs(left - right[side*n + i]) < 1e-4*size);
            }
        }
    }
    // float32 rounding can leave a gram that isn't positive any more
    const auto x = laprox::solve_ridge({ 1.0f, 1.5f, 1.5f, 1.0f }, 2, 0.25, { 1.0f, 1.0f });
    CHECK(std::isfinite(x[0]) && std::isfinite(x[1]));
    std::printf("ok\n");
}
