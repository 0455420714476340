// A device that a machine without an accelerator can have: PyTorch's PrivateUse1, in memory of its own.
//
// Operators run on the CPU, on copies. What matters is what they refuse and what they count, as of an accelerator:
// an operand with dimensions that lies on the CPU is an error, and whatever makes the CPU wait for values is counted.
// Of operators that write what their schema does not name (batch norm's running statistics), the write is lost.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// --- what is counted

// Operators whose result has a size that depends on values.
const std::set<std::string> kWaiting = {
    "aten::_unique", "aten::_unique2", "aten::bincount", "aten::equal", "aten::masked_select",
    "aten::nonzero", "aten::repeat_interleave.Tensor", "aten::unique_consecutive", "aten::unique_dim"};

std::map<std::string, int64_t> waits;
thread_local bool computing = false;  // on the CPU, on behalf of the device

void wait_for(const std::string& what) {
  if (!computing) ++waits[what];
}

class Computing {
 public:
  Computing() : before_(computing) { computing = true; }
  ~Computing() { computing = before_; }

 private:
  bool before_;
};

// --- memory

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (data) memset(data, 0x7b, bytes);  // 1.3e36 as fp32: what is read before it is written shows
    return {data, data, &release, kDevice};
  }
  static void release(void* data) {
    if (data) c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(0); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::StorageImpl* own = storage.unsafeGetStorageImpl();
    c10::DataPtr data = memory.allocate(bytes);
    if (own->data() && data.get()) memcpy(data.get(), own->data(), std::min(bytes, own->nbytes()));
    own->set_data_ptr_noswap(std::move(data));
    own->set_nbytes(bytes);
  }
  void init() const override {}
};

// The same memory as the CPU sees it.
at::Tensor on_cpu(const at::Tensor& x) {
  if (x.device().is_cpu()) return x;
  const auto elements = static_cast<int64_t>(x.storage().nbytes() / x.element_size());
  auto whole = at::from_blob(x.storage().mutable_data(), {elements}, x.options().device(at::kCPU));
  auto seen = whole.as_strided(x.sizes(), x.strides(), x.storage_offset());
  if (x.is_conj()) seen = seen.conj();
  return x.is_neg() ? at::_neg_view(seen) : seen;
}

// --- operators that know the memory

using Size = c10::IntArrayRef;
using Dtype = std::optional<at::ScalarType>;

at::Tensor empty(
    Size size, Dtype dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    Size size, Size stride, Dtype dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (!from.numel()) return to;
  if (to.device().is_cpu() && !from.device().is_cpu()) wait_for("copy to the CPU");
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  const Computing here;
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Scalar item(const at::Tensor& x) {
  wait_for("item");
  return at::_local_scalar_dense(on_cpu(x));
}

at::Tensor& set_storage(at::Tensor& x, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / x.element_size());
  return at::cpu::set_(x, storage, 0, {elements}, {});
}

at::Tensor& set_part(at::Tensor& x, at::Storage storage, int64_t offset, Size size, Size stride) {
  return at::cpu::set_(x, storage, offset, size, stride);
}

at::Tensor as_strided(const at::Tensor& x, Size size, Size stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(x, size, stride, offset);
}

// --- all other operators

void refuse_cpu(const at::Tensor& x, const std::string& name) {
  const bool lies_there = x.defined() && x.device().is_cpu() && x.dim() > 0;
  TORCH_CHECK(!lies_there, "Expected all tensors to be on the same device: ", name, " was given one on the CPU");
}

void look_at(const c10::IValue& argument, const std::string& name) {
  const bool indexes = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0;
  if (argument.isTensor() && !indexes) refuse_cpu(argument.toTensor(), name);  // an index may lie on the CPU
  if (!argument.isList()) return;
  for (const c10::IValue& entry : argument.toListRef()) {
    if (!entry.isTensor() || !entry.toTensor().defined()) continue;
    if (indexes && entry.toTensor().scalar_type() == at::kBool) wait_for(name + " by a mask");
    if (!indexes) refuse_cpu(entry.toTensor(), name);
  }
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& overload = op.schema().overload_name();
  const std::string name = op.schema().name() + (overload.empty() ? "" : "." + overload);
  if (kWaiting.count(name)) wait_for(name);
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) look_at(argument, name);
  const Computing here;
  at::native::cpu_fallback(op, stack);
}

std::vector<std::string> take_waits() {
  std::vector<std::string> found;
  for (const auto& [what, times] : waits) found.insert(found.end(), times, what);
  waits.clear();
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", [](const at::Tensor& x, Size size) { return at::native::view(x, size); });
  library.impl("_reshape_alias", [](const at::Tensor& x, Size size, Size stride) {
    return at::native::_reshape_alias(x, size, stride);
  });
  library.impl("unfold", [](const at::Tensor& x, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(x, dim, size, step);
  });
  library.impl("resize_", [](const at::Tensor& x, Size size, std::optional<at::MemoryFormat> format) -> const at::Tensor& {
    return at::native::resize_(x, size, format);
  });
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_part);
}

// What made the CPU wait since this was asked last, one entry each time; begins to serve with the first call.
TORCH_LIBRARY(simulated, library) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  library.def("take_waits", take_waits);
}
