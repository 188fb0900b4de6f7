// Programs with one fault each, which compute-sanitizer has to find before it is believed that it finds none in ours.
#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

// One element beyond the end.
__global__ void bounds(int* data) { data[threadIdx.x + 1] = 1; }

// Each thread reads what its neighbour writes, without a barrier in between.
__global__ void race(int* data) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = int(threadIdx.x);
  data[threadIdx.x] = shared[(threadIdx.x + 33) % kThreads];
}

// Reads memory that nobody has written.
__global__ void uninitialised(int* data) { data[threadIdx.x] += 1; }

// A barrier that some threads of a warp do not reach.
__global__ void divergent(int* data) {
  if (threadIdx.x < 40) __syncthreads();
  data[threadIdx.x] = 1;
}

// No fault.
__global__ void none(int* data) { data[threadIdx.x] = 1; }

}  // namespace

int main(int count, char** arguments) {
  const char* name = count == 2 ? arguments[1] : "";
  int* data = nullptr;
  if (cudaMalloc(&data, kThreads * sizeof(int)) != cudaSuccess) return 2;
  if (!std::strcmp(name, "bounds")) {
    bounds<<<1, kThreads>>>(data);
  } else if (!std::strcmp(name, "race")) {
    race<<<1, kThreads>>>(data);
  } else if (!std::strcmp(name, "uninitialised")) {
    uninitialised<<<1, kThreads>>>(data);
  } else if (!std::strcmp(name, "divergent")) {
    divergent<<<1, kThreads>>>(data);
  } else if (!std::strcmp(name, "none")) {
    none<<<1, kThreads>>>(data);
  } else {
    return 2;
  }
  std::printf("%s: %s\n", name, cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
