// Ends what begin_target.h began.
#ifndef FUSEDRES_TARGET_DEFAULT
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
