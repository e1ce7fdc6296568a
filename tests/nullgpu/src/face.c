/* Which card it claims to be, and the questions about devices. */
#include "nullgpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct face face;
__thread int current = 0;

static long long number(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoll(text) : otherwise;
}

/* An H100, unless the environment says otherwise. */
__attribute__((constructor)) static void read_face(void) {
    const char *name = getenv("NULLGPU_NAME"), *capability = getenv("NULLGPU_CAPABILITY");
    face.name = name && *name ? name : "NVIDIA H100 80GB HBM3";
    if (!capability || sscanf(capability, "%d.%d", &face.major, &face.minor) != 2) face.major = 9, face.minor = 0;
    face.count = number("NULLGPU_COUNT", 1);
    if (face.count > MAX_DEVICES) face.count = MAX_DEVICES;
    face.driver = number("NULLGPU_DRIVER", CUDA_VERSION > 13020 ? CUDA_VERSION : 13020);
    face.memory = number("NULLGPU_MEMORY", 84929347584);
    face.shared_block = number("NULLGPU_SHARED_BLOCK", 232448);
    face.shared_sm = number("NULLGPU_SHARED_SM", 233472);
    face.multiprocessors = number("NULLGPU_MULTIPROCESSORS", 132);
    face.threads_sm = number("NULLGPU_THREADS_SM", 2048);
    face.blocks_sm = number("NULLGPU_BLOCKS_SM", 32);
    face.l2 = number("NULLGPU_L2", 52428800);
}

/* What cudart answers to every call where the driver is older than itself (a newer minor version is fine), or where
 * there is no card. */
static int ready(void) {
    if (face.driver / 1000 < CUDA_VERSION / 1000) return fail(cudaErrorInsufficientDriver);
    return face.count > 0 ? 0 : fail(cudaErrorNoDevice);
}

/* ---- runtime */

API int cudaGetDeviceCount(int *n) {
    int error = ready();
    *n = error ? 0 : face.count;
    return error;
}

API int cudaGetDevice(int *device) {
    *device = current;
    return ready();
}

API int cudaSetDevice(int device) {
    if (device < 0 || device >= face.count) return fail(cudaErrorInvalidDevice);
    current = device;
    return 0;
}

API int cudaDriverGetVersion(int *version) {
    *version = face.driver;
    return 0;
}

API int cudaRuntimeGetVersion(int *version) {
    *version = CUDA_VERSION;
    return 0;
}

int attribute(int number, int device) {
    switch (number) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return face.shared_block;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return face.shared_sm;
    case cudaDevAttrReservedSharedMemoryPerBlock: return face.major >= 8 ? 1024 : 0;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000; /* kHz */
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrMultiProcessorCount: return face.multiprocessors;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return face.threads_sm;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return face.blocks_sm;
    case cudaDevAttrL2CacheSize: return face.l2;
    case cudaDevAttrComputeCapabilityMajor: return face.major;
    case cudaDevAttrComputeCapabilityMinor: return face.minor;
    case cudaDevAttrPciBusId: return device + 1;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED:
    case cudaDevAttrMemoryPoolsSupported: return 1;
    default: return 0; /* not integrated, default compute mode, and everything else that it does not have */
    }
}

API int cudaDeviceGetAttribute(int *value, int number, int device) {
    if (device < 0 || device >= face.count) return fail(cudaErrorInvalidDevice);
    *value = attribute(number, device);
    return 0;
}

API int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device < 0 || device >= face.count) return fail(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", face.name);
    memset(p->uuid.bytes, device + 1, sizeof p->uuid.bytes);
    p->major = face.major, p->minor = face.minor;
    p->totalGlobalMem = face.memory;
    p->totalConstMem = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = face.shared_block;
    p->sharedMemPerMultiprocessor = face.shared_sm;
    p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = face.threads_sm;
    p->maxBlocksPerMultiProcessor = face.blocks_sm;
    p->multiProcessorCount = face.multiprocessors;
    p->l2CacheSize = face.l2;
    p->textureAlignment = 512;
    p->memoryBusWidth = 5120;
    p->asyncEngineCount = 3;
    p->pciBusID = device + 1;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
    p->memoryPoolsSupported = 1;
    return 0;
}

API int cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { /* its name in CUDA 12 */
    return cudaGetDeviceProperties(p, device);
}

API int cudaDeviceGetPCIBusId(char *text, int room, int device) {
    snprintf(text, room, "0000:%02x:00.0", device + 1);
    return 0;
}

API int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return 0;
}

API int cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    return 0;
}

/* ---- driver */

API CUresult cuInit(unsigned flags) {
    return face.count > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

API CUresult cuDriverGetVersion(int *version) {
    return (CUresult)cudaDriverGetVersion(version);
}

API CUresult cuDeviceGetCount(int *n) {
    *n = face.count;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int number) {
    if (number < 0 || number >= face.count) return CUDA_ERROR_INVALID_DEVICE;
    *device = number;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char *text, int room, CUdevice device) {
    snprintf(text, room, "%s", face.name);
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid(CUuuid *id, CUdevice device) {
    memset(id->bytes, device + 1, sizeof id->bytes);
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute number, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, number, device);
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    *bytes = face.memory;
    return CUDA_SUCCESS;
}
