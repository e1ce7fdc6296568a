/* Kernel launches: PyTorch's own, and Triton's with what their cubin says. */
#include "nullgpu.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- names of PyTorch's kernels, as its libraries register them when they are loaded */

#define SLOTS (1u << 18)
static struct { const void *stub; const char *name; } names[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static unsigned slot_of(const void *stub) {
    unsigned i = (unsigned)(((uintptr_t)stub >> 4) * 2654435761u) % SLOTS;
    while (names[i].stub && names[i].stub != stub) i = (i + 1) % SLOTS;
    return i;
}

API void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}

API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t bytes,
                           int constant, int global) {}

API void __cudaRegisterFunction(void **handle, const char *stub, char *device, const char *name, int limit, void *tid,
                                void *bid, void *block, void *grid, int *size) {
    pthread_mutex_lock(&lock);
    static unsigned known = 0;
    unsigned i = slot_of(stub);
    if (!names[i].stub && known < SLOTS / 2) names[i].stub = stub, names[i].name = name, known++;
    pthread_mutex_unlock(&lock);
}

static const char *name_of(const void *stub) {
    const char *name = names[slot_of(stub)].name;
    return name ? name : "?";
}

/* ---- the checks of a launch */

int launch(const char *how, const char *name, dim3 grid, dim3 block, size_t shared, const void *stream,
           int pointers_on) {
    struct stream *s = stream_of(stream);
    record("\"event\": \"launch\", \"how\": \"%s\", \"name\": \"%.900s\", \"device\": %d, \"stream\": %d, \"grid\": "
           "[%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %zu, \"capture\": %llu", how, name, current, s->number,
           grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, count_node(s));
    if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
        return refuse(cudaErrorInvalidConfiguration, "%.200s with the grid %u, %u, %u", name, grid.x, grid.y, grid.z);
    if (!block.x || !block.y || !block.z || block.z > 64 || (size_t)block.x * block.y * block.z > 1024)
        return refuse(cudaErrorInvalidConfiguration, "%.200s with the block %u, %u, %u", name, block.x, block.y,
                      block.z);
    if (shared > (size_t)face.shared_block)
        return refuse(cudaErrorInvalidValue, "%.200s with %zu bytes of shared memory; the card has %d", name, shared,
                      face.shared_block);
    if (s->device != current)
        return refuse(cudaErrorInvalidResourceHandle, "%.200s on a stream of device %d while device %d is current",
                      name, s->device, current);
    if (pointers_on >= 0 && pointers_on != current)
        return refuse(cudaErrorIllegalAddress, "%.200s with memory of device %d while device %d is current", name,
                      pointers_on, current);
    return 0;
}

/* ---- PyTorch's launches */

static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}

API int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
    return 0;
}

API int __cudaGetKernel(const void **kernel, const void *stub) {
    *kernel = stub;
    return 0;
}

API int cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **values, size_t shared, void *stream) {
    return fail(launch("torch", name_of(stub), grid, block, shared, stream, -1));
}

API int __cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **values, size_t shared, void *stream) {
    return cudaLaunchKernel(stub, grid, block, values, shared, stream);
}

API int cudaLaunchCooperativeKernel(const void *stub, dim3 grid, dim3 block, void **values, size_t shared,
                                    void *stream) {
    return cudaLaunchKernel(stub, grid, block, values, shared, stream);
}

API int cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *stub, void **values) {
    return cudaLaunchKernel(stub, how->gridDim, how->blockDim, values, how->dynamicSmemBytes, how->stream);
}

API int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *stub) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = face.major * 10 + face.minor;
    if (a->ptxVersion == 89) a->ptxVersion = a->binaryVersion = 86; /* PyTorch brings no code of its own for 8.9 */
    a->maxDynamicSharedSizeBytes = face.shared_block;
    return 0;
}

API int cudaFuncSetAttribute(const void *stub, int which, int value) {
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= face.shared_block) return 0;
    return fail(refuse(cudaErrorInvalidValue, "%.200s asks for %d bytes of shared memory; the card has %d",
                       name_of(stub), value, face.shared_block));
}

API int cudaKernelSetAttributeForDevice(const void *stub, int which, int value, int device) {
    return cudaFuncSetAttribute(stub, which, value);
}

/* Blocks of a multiprocessor: by threads and shared memory alone, as the registers of PyTorch's kernels are unknown. */
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *stub, int block, size_t shared) {
    int by_threads = face.threads_sm / (block > 0 ? block : 1);
    int by_shared = shared ? (int)(face.shared_sm / (shared + 1024)) : face.blocks_sm;
    *n = by_threads < by_shared ? by_threads : by_shared;
    if (*n > face.blocks_sm) *n = face.blocks_sm;
    return 0;
}

API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *stub, int block, size_t shared,
                                                               unsigned flags) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, stub, block, shared);
}

API int cudaGetSymbolAddress(void **p, const void *symbol) {
    static char memory[1 << 16];
    *p = memory;
    return 0;
}

/* ---- Triton's launches: modules with a cubin */

API CUresult cuModuleLoadData(CUmodule *module, const void *cubin) {
    *module = (CUmodule)cubin; /* Triton keeps the bytes while it loads functions of it, and no longer */
    return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule *module, const void *cubin, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, cubin);
}

API CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long bytes = ftell(file);
    void *cubin = malloc(bytes);
    rewind(file);
    size_t got = fread(cubin, 1, bytes, file);
    fclose(file);
    return got == (size_t)bytes ? cuModuleLoadData(module, cubin) : CUDA_ERROR_INVALID_IMAGE;
}

API CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

API CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode *mode) {
    *mode = CU_MODULE_EAGER_LOADING;
    return CUDA_SUCCESS;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    struct kernel *k = kernel_in(module, name);
    record("\"event\": \"kernel\", \"name\": \"%.900s\", \"registers\": %d, \"local\": %d", name, k->registers,
           k->local);
    *function = (CUfunction)k;
    return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    const struct kernel *k = (const struct kernel *)function;
    *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? k->registers
           : which == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES ? k->local
           : which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? k->max_dynamic
           : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    struct kernel *k = (struct kernel *)function;
    /* Newer ones than those of CUDA 12, among them shared memory without a size asked for, are those of drivers to
     * come: Triton then asks as it does today. */
    if (which > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE) return CUDA_ERROR_INVALID_VALUE;
    if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value > face.shared_block)
        return (CUresult)refuse(CUDA_ERROR_INVALID_VALUE, "%.200s asks for %d bytes of shared memory; the card has %d",
                                k->name, value, face.shared_block);
    k->max_dynamic = value;
    return CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache wish) { return CUDA_SUCCESS; }
API CUresult cuFuncLoad(CUfunction function) { return CUDA_SUCCESS; }

API CUresult cuFuncGetModule(CUmodule *module, CUfunction function) {
    *module = NULL;
    return CUDA_SUCCESS;
}

API CUresult cuFuncGetParamInfo(CUfunction function, size_t number, size_t *offset, size_t *bytes) {
    const struct kernel *k = (const struct kernel *)function;
    if (number >= (size_t)k->parameters) return CUDA_ERROR_INVALID_VALUE;
    *bytes = k->size[number], *offset = 0;
    return CUDA_SUCCESS;
}

/* Describe a tensor to the tensor memory accelerator. The limits are those that cuda.h gives, for ordinary types and
 * without interleaving, which is all that Triton asks for; the description itself is empty. */
API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
    static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; /* of an element, by type */
    const char *why = NULL;
    unsigned row = (unsigned)type < sizeof bytes / sizeof *bytes ? box[0] * bytes[type] : 0;
    if (face.major < 9) why = "needs compute capability 9.0";
    else if (rank < 1 || rank > 5) why = "has no dimensions, or more than 5";
    else if (!row || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) why = "is packed or interleaved";
    else if ((uintptr_t)map % 64) why = "is to be written to an address that is no multiple of 64";
    else if ((uintptr_t)address % 16) why = "is of an address that is no multiple of 16";
    else if (row % 16) why = "has rows of a box that are no multiple of 16 bytes";
    else if ((swizzle == CU_TENSOR_MAP_SWIZZLE_32B && row > 32) || (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && row > 64) ||
             (swizzle >= CU_TENSOR_MAP_SWIZZLE_128B && row > 128)) why = "has rows of a box longer than the swizzle";
    for (cuuint32_t i = 0; !why && i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32) why = "has a size that is 0 or above 2^32";
        else if (!box[i] || box[i] > 256) why = "has a size of the box that is not 1 to 256";
        else if (!steps[i] || steps[i] > 8) why = "has a step that is not 1 to 8";
        else if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
            why = "has a stride that is no multiple of 16 bytes, or 2^40 and more";
    }
    if (why) return (CUresult)refuse(CUDA_ERROR_INVALID_VALUE, "a tensor map %s", why);
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

/* Return the device of the first pointer among the values that is not of the current one; else the current, or −1. */
static int pointers_on(const struct kernel *k, void **values) {
    int found = -1;
    for (int i = 0; values && i < k->parameters; i++) {
        if (k->size[i] != 8 || !values[i]) continue;
        int device = device_of(*(void **)values[i]);
        if (device >= 0 && device != current) return device;
        if (device >= 0) found = device;
    }
    return found;
}

static CUresult launch_kernel(CUfunction function, dim3 grid, dim3 block, unsigned shared, CUstream stream,
                              void **values) {
    const struct kernel *k = (const struct kernel *)function;
    unsigned threads = block.x * block.y * block.z;
    if (shared > 49152 && shared > (unsigned)k->max_dynamic)
        return (CUresult)refuse(CUDA_ERROR_INVALID_VALUE, "%.200s takes %u bytes of shared memory without asking first",
                                k->name, shared);
    if (k->registers * ((threads + 31) / 32 * 32) > 65536)
        return (CUresult)refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%.200s: %u threads of %d registers", k->name,
                                threads, k->registers);
    return (CUresult)launch("triton", k->name, grid, block, shared, stream, pointers_on(k, values));
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **values, void **extra) {
    dim3 grid = {how->gridDimX, how->gridDimY, how->gridDimZ}, block = {how->blockDimX, how->blockDimY, how->blockDimZ};
    return launch_kernel(function, grid, block, how->sharedMemBytes, how->hStream, values);
}

API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, CUstream stream, void **values, void **extra) {
    dim3 grid = {gx, gy, gz}, block = {bx, by, bz};
    return launch_kernel(function, grid, block, shared, stream, values);
}

API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                       unsigned by, unsigned bz, unsigned shared, CUstream stream, void **values) {
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, values, NULL);
}

API CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *how) {
    *n = 1;
    return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction function, int block, size_t shared) {
    const struct kernel *k = (const struct kernel *)function;
    int by_registers = k->registers ? 65536 / (k->registers * (block > 0 ? block : 1)) : face.blocks_sm;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, NULL, block, shared);
    if (by_registers < *n) *n = by_registers;
    return CUDA_SUCCESS;
}
