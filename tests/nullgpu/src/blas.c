/* cuBLAS: products that are written down and not computed. m, n, k are as cuBLAS takes them, columns first. */
#include "nullgpu.h"

#include <stdlib.h>
#include <string.h>

struct handle { struct stream *stream; int device, pointer_mode, math_mode; };

static int product(const char *call, struct stream *s, long m, long n, long k, long batch) {
    record("\"event\": \"product\", \"name\": \"%s\", \"device\": %d, \"stream\": %d, \"m\": %ld, \"n\": %ld, "
           "\"k\": %ld, \"batch\": %ld, \"capture\": %llu", call, current, s->number, m, n, k, batch, count_node(s));
    if (s->device != current)
        return refuse(13, "%s on a stream of device %d while device %d is current", call, s->device, current);
    return 0;
}

/* ---- cuBLAS */

API int cublasCreate_v2(struct handle **handle) {
    *handle = calloc(1, sizeof **handle);
    (*handle)->device = current;
    (*handle)->stream = stream_of(NULL);
    return 0;
}

API int cublasDestroy_v2(struct handle *handle) {
    free(handle);
    return 0;
}

API int cublasSetStream_v2(struct handle *handle, void *stream) {
    handle->stream = stream_of(stream);
    if (handle->device == handle->stream->device) return 0;
    return refuse(13, "a cuBLAS handle of device %d gets a stream of device %d", handle->device,
                  handle->stream->device);
}

API int cublasSetWorkspace_v2(struct handle *handle, void *p, size_t bytes) { return 0; }
API int cublasSetSmCountTarget(struct handle *handle, int n) { return 0; }

API int cublasSetMathMode(struct handle *handle, int mode) {
    handle->math_mode = mode;
    return 0;
}

API int cublasGetMathMode(struct handle *handle, int *mode) {
    *mode = handle->math_mode;
    return 0;
}

API int cublasSetPointerMode_v2(struct handle *handle, int mode) {
    handle->pointer_mode = mode;
    return 0;
}

API int cublasGetPointerMode_v2(struct handle *handle, int *mode) {
    *mode = handle->pointer_mode;
    return 0;
}

#define GEMM(name) \
    API int name(struct handle *h, int a, int b, int m, int n, int k) { return product(#name, h->stream, m, n, k, 1); }
GEMM(cublasGemmEx)
GEMM(cublasSgemmEx)
GEMM(cublasSgemm_v2)
GEMM(cublasDgemm_v2)

#define GEMV(name) \
    API int name(struct handle *h, int a, int m, int n) { return product(#name, h->stream, m, 1, n, 1); }
GEMV(cublasSgemv_v2)
GEMV(cublasDgemv_v2)

#define DOT(name) \
    API int name(struct handle *h, int n) { return product(#name, h->stream, 1, 1, n, 1); }
DOT(cublasSdot_v2)
DOT(cublasDdot_v2)
DOT(cublasDotEx)

API int cublasGemmStridedBatchedEx(struct handle *h, int ta, int tb, int m, int n, int k, const void *alpha,
                                   const void *a, int a_type, int lda, long long sa, const void *b, int b_type, int ldb,
                                   long long sb, const void *beta, void *c, int c_type, int ldc, long long sc,
                                   int batch) {
    return product("cublasGemmStridedBatchedEx", h->stream, m, n, k, batch);
}

#define BATCHED(name) \
    API int name(struct handle *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda, \
                 long long sa, const void *b, int ldb, long long sb, const void *beta, void *c, int ldc, long long sc, \
                 int batch) { return product(#name, h->stream, m, n, k, batch); }
BATCHED(cublasSgemmStridedBatched)
BATCHED(cublasDgemmStridedBatched)

/* ---- cuBLASLt: a layout keeps its shape, a description whether a matrix is transposed */

struct layout { unsigned long long rows, columns; int batch; };
struct description { int transposed; };
#define TRANSPOSE_A 3 /* CUBLASLT_MATMUL_DESC_TRANSA */
#define BATCH_COUNT 5 /* CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT */

API size_t cublasLtGetVersion(void) { return 130000; }

API int cublasLtCreate(void **handle) {
    *handle = calloc(1, 8);
    return 0;
}

API int cublasLtMatmulDescCreate(struct description **d, int compute, int scale) {
    *d = calloc(1, sizeof **d);
    return 0;
}

API int cublasLtMatmulDescSetAttribute(struct description *d, int which, const void *value, size_t bytes) {
    if (which == TRANSPOSE_A) memcpy(&d->transposed, value, sizeof(int));
    return 0;
}

API int cublasLtMatrixLayoutCreate(struct layout **l, int type, unsigned long long rows, unsigned long long columns,
                                   long long stride) {
    *l = calloc(1, sizeof **l);
    (*l)->rows = rows, (*l)->columns = columns, (*l)->batch = 1;
    return 0;
}

API int cublasLtMatrixLayoutSetAttribute(struct layout *l, int which, const void *value, size_t bytes) {
    if (which == BATCH_COUNT) memcpy(&l->batch, value, sizeof(int));
    return 0;
}

API int cublasLtMatmulPreferenceCreate(void **p) { return cublasLtCreate(p); }
API int cublasLtMatmulPreferenceSetAttribute(void *p, int which, const void *value, size_t bytes) { return 0; }

#define DESTROY(name) API int name(void *p) { free(p); return 0; }
DESTROY(cublasLtMatmulDescDestroy)
DESTROY(cublasLtMatrixLayoutDestroy)
DESTROY(cublasLtMatmulPreferenceDestroy)

/* Offers one algorithm that needs no workspace. The result's first bytes are the algorithm, then sizes and a status. */
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *d, void *a, void *b, void *c, void *out, void *preference,
                                       int wanted, void *results, int *found) {
    memset(results, 0, 96); /* cublasLtMatmulHeuristicResult_t */
    *found = 1;
    return 0;
}

API int cublasLtMatmul(void *handle, struct description *d, const void *alpha, const void *a, struct layout *la,
                       const void *b, struct layout *lb, const void *beta, const void *c, struct layout *lc, void *out,
                       struct layout *lo, const void *algorithm, void *workspace, size_t bytes, void *stream) {
    return product("cublasLtMatmul", stream_of(stream), lo->rows, lo->columns, d->transposed ? la->rows : la->columns,
                   lo->batch);
}
