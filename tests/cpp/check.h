#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#define CHECK(condition) \
    do { if (!(condition)) { std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); std::exit(1); } } while (0)

static std::mt19937 rng(1);

static inline int below(int n) { return (int) (rng() % (uint32_t) n); }
