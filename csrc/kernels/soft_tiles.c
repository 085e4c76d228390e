/* The body of amx.c on any CPU, over tiles in plain C: for tests of it. */
#define FLORA_VECTOR_BYTES 16
#include "dots.h"
#include "tile.h"
#include "vec.h"
#include "pairs.inc.h"
#include "tiles.inc.h"

const flora_dots flora_dots_soft_tiles = {.begin = begin,
                                          .end = end,
                                          .dot = dot,
                                          .dot_act = dot_act,
                                          .pair = pair,
                                          .pair_rounded = pair_rounded,
                                          .round = round_rows};
