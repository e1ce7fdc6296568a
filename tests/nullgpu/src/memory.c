/* Memory of each device, copies, virtual memory management.
 *
 * Each device has its own range of addresses, so that an address says its device. Memory is mapped without being
 * reserved: a page takes host memory only when a copy or memset writes to it. */
#include "nullgpu.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define FIRST 0x200000000000ull           /* address of the first device's range */
#define SPAN (1ull << 42)                 /* addresses of a device: 4 TB */
#define UNIT (2ull << 20)                 /* allocations start at multiples of it */
#define CONTEXT (450ull << 20)            /* bytes that a context holds before a program asks for anything */
#define MAX_COPY (4ull << 20)             /* copies of more bytes move nothing */
#define MAX_SET (64ull << 10)
#define MAX_BLOCKS 65536

struct block { char *at; size_t bytes, mapped; int device; bool counted; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct block blocks[MAX_BLOCKS];
static int n_blocks = 0;
static char *cursor[MAX_DEVICES];
static size_t used[MAX_DEVICES], peak[MAX_DEVICES];

int device_of(const void *p) {
    unsigned long long at = (unsigned long long)p;
    return at >= FIRST && at < FIRST + MAX_DEVICES * SPAN ? (int)((at - FIRST) / SPAN) : -1;
}

/* Count bytes of a device. Returns false where it has no more. */
static bool take(int device, size_t bytes) {
    if (used[device] + bytes > face.memory - CONTEXT) return false;
    used[device] += bytes;
    if (used[device] > peak[device]) peak[device] = used[device];
    return true;
}

/* Find addresses in the device's range. Called under the lock. */
static char *map(int device, size_t bytes, int protection) {
    char *start = (char *)(FIRST + device * SPAN), *end = start + SPAN;
    if (!cursor[device]) cursor[device] = start;
    for (int turn = 0; turn < 1 << 20; turn++) {
        if (cursor[device] + bytes > end) cursor[device] = start;
        char *at = mmap(cursor[device], bytes, protection,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        cursor[device] += at == MAP_FAILED ? UNIT : bytes;
        if (at != MAP_FAILED) {
            madvise(at, bytes, MADV_NOHUGEPAGE);
            return at;
        }
    }
    return NULL;
}

static int allocate(void **p, size_t bytes, int device, bool counted) {
    size_t mapped = (bytes + UNIT - 1) / UNIT * UNIT;
    *p = NULL;
    if (!bytes) return 0;
    pthread_mutex_lock(&lock);
    if (n_blocks < MAX_BLOCKS && (!counted || take(device, bytes))) {
        char *at = map(device, mapped, counted ? PROT_READ | PROT_WRITE : PROT_NONE);
        if (at) blocks[n_blocks++] = (struct block){at, bytes, mapped, device, counted};
        else if (counted) used[device] -= bytes;
        *p = at;
    }
    pthread_mutex_unlock(&lock);
    if (counted) record("\"event\": \"%s\", \"device\": %d, \"bytes\": %zu", *p ? "malloc" : "out_of_memory", device,
                        bytes);
    return *p ? 0 : cudaErrorMemoryAllocation;
}

static int release(void *p) {
    int found = p == NULL;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_blocks && !found; i++) {
        if (blocks[i].at != p) continue;
        munmap(p, blocks[i].mapped);
        if (blocks[i].counted) used[blocks[i].device] -= blocks[i].bytes;
        blocks[i] = blocks[--n_blocks];
        found = 1;
    }
    pthread_mutex_unlock(&lock);
    return found ? 0 : refuse(cudaErrorInvalidValue, "freeing memory that nobody has allocated");
}

/* ---- allocation */

API int cudaMalloc(void **p, size_t bytes) {
    int error = unsafe_in_capture("cudaMalloc");
    return fail(error ? error : allocate(p, bytes, current, true));
}

API int cudaFree(void *p) {
    int error = p ? unsafe_in_capture("cudaFree") : 0;
    return fail(error ? error : release(p));
}

API int cudaMallocManaged(void **p, size_t bytes, unsigned flags) { return cudaMalloc(p, bytes); }
API int cudaMallocAsync(void **p, size_t bytes, void *stream) { return fail(allocate(p, bytes, current, true)); }
API int cudaFreeAsync(void *p, void *stream) { return fail(release(p)); }

API int cudaMemGetInfo(size_t *free, size_t *total) {
    pthread_mutex_lock(&lock);
    *total = face.memory;
    *free = face.memory - CONTEXT - used[current];
    pthread_mutex_unlock(&lock);
    return 0;
}

API int cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
    *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return *p ? 0 : fail(cudaErrorMemoryAllocation);
}

API int cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
API int cudaHostRegister(void *p, size_t bytes, unsigned flags) { return 0; }
API int cudaHostUnregister(void *p) { return 0; }

API int cudaFreeHost(void *p) {
    free(p);
    return 0;
}

API int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    int device = device_of(p);
    memset(a, 0, sizeof *a);
    a->type = device < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice;
    a->device = device;
    a->devicePointer = device < 0 ? NULL : (void *)p;
    return 0;
}

API CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr p) {
    if (device_of((void *)p) < 0) return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)data = p;
    else if (which == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int *)data = device_of((void *)p);
    else *(int *)data = 0;
    return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *which, void **data, CUdeviceptr p) {
    for (unsigned i = 0; i < n; i++)
        if (cuPointerGetAttribute(data[i], which[i], p) && which[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
            *(CUdeviceptr *)data[i] = p;
    return CUDA_SUCCESS;
}

/* ---- virtual memory management, of expandable segments */

static size_t handle_bytes[MAX_BLOCKS];
static int handle_device[MAX_BLOCKS];
static CUmemGenericAllocationHandle n_handles = 0;

API CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *what,
                                           CUmemAllocationGranularity_flags flags) {
    *bytes = UNIT;
    return CUDA_SUCCESS;
}

API CUresult cuMemAddressReserve(CUdeviceptr *p, size_t bytes, size_t alignment, CUdeviceptr wish,
                                 unsigned long long flags) {
    record("\"event\": \"reserve_addresses\", \"device\": %d, \"bytes\": %zu", current, bytes);
    return (CUresult)allocate((void **)p, bytes, current, false);
}

API CUresult cuMemAddressFree(CUdeviceptr p, size_t bytes) {
    return (CUresult)release((void *)p);
}

API CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *what,
                         unsigned long long flags) {
    int device = what->location.id;
    pthread_mutex_lock(&lock);
    bool enough = n_handles + 1 < MAX_BLOCKS && take(device, bytes);
    if (enough) {
        *handle = ++n_handles;
        handle_bytes[*handle] = bytes, handle_device[*handle] = device;
    }
    pthread_mutex_unlock(&lock);
    record("\"event\": \"%s\", \"device\": %d, \"bytes\": %zu", enough ? "create_memory" : "out_of_memory", device,
           bytes);
    return enough ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    pthread_mutex_lock(&lock);
    used[handle_device[handle]] -= handle_bytes[handle];
    handle_bytes[handle] = 0;
    if (handle == n_handles) n_handles--;
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

API CUresult cuMemMap(CUdeviceptr p, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                      unsigned long long flags) {
    mprotect((void *)p, bytes, PROT_READ | PROT_WRITE);
    return CUDA_SUCCESS;
}

API CUresult cuMemUnmap(CUdeviceptr p, size_t bytes) {
    madvise((void *)p, bytes, MADV_DONTNEED);
    mprotect((void *)p, bytes, PROT_NONE);
    return CUDA_SUCCESS;
}

API CUresult cuMemSetAccess(CUdeviceptr p, size_t bytes, const CUmemAccessDesc *who, size_t n) { return CUDA_SUCCESS; }

/* ---- copies */

static int copy(void *to, const void *from, size_t bytes, bool waits, const char *call) {
    int target = device_of(to), source = device_of(from);
    int error = waits ? unsafe_in_capture(call) : 0;
    if (error) return fail(error);
    record("\"event\": \"copy\", \"from\": %d, \"to\": %d, \"bytes\": %zu", source, target, bytes);
    if (waits && (target < 0 || source < 0)) record("\"event\": \"sync\", \"call\": \"%s\"", call);
    if (bytes <= MAX_COPY && (target < 0 || source < 0)) memmove(to, from, bytes);
    return 0;
}

API int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    return copy(to, from, bytes, true, "cudaMemcpy");
}

API int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    count_node(stream_of(stream));
    return copy(to, from, bytes, false, "cudaMemcpyAsync");
}

API int cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, void *stream) {
    return copy(to, from, bytes, false, "cudaMemcpyPeerAsync");
}

API int cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, int kind) { return 0; }

static int set(void *p, int value, size_t bytes, struct stream *stream) {
    record("\"event\": \"memset\", \"device\": %d, \"bytes\": %zu", device_of(p), bytes);
    if (bytes <= MAX_SET) memset(p, value, bytes);
    return 0;
}

API int cudaMemset(void *p, int value, size_t bytes) { return set(p, value, bytes, stream_of(NULL)); }

API int cudaMemsetAsync(void *p, int value, size_t bytes, void *stream) {
    count_node(stream_of(stream));
    return set(p, value, bytes, stream_of(stream));
}

/* ---- for programs under it, by ctypes */

API void nullgpu_memory(int device, size_t *now, size_t *most) {
    *now = used[device], *most = peak[device];
}

API void nullgpu_reset_peak(int device) {
    peak[device] = used[device];
}
