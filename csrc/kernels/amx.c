/* The bfloat16 product on AMX-BF16, with the bodies of x86-64-v4 and AVX512-BF16 around it. */
#if defined(__x86_64__)

#    define FLORA_VECTOR_BYTES 64
#    include "dots.h"
#    include "tile.h"
#    include "vec.h"
#    include "pairs.inc.h"
#    include "tiles.inc.h"

const flora_dots flora_dots_amx = {.begin = begin,
                                   .end = end,
                                   .dot = dot,
                                   .dot_act = dot_act,
                                   .pair = pair,
                                   .pair_rounded = pair_rounded,
                                   .round = round_rows};

#endif
