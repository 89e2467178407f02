// A device in host memory that is not the CPU, for tests: torch's PrivateUse1 under the name `second`.
//
// Its memory is malloc's. Every operator that has no kernel here runs the CPU's on views of that memory, and its results are
// adopted: nothing is copied. What a CUDA device refuses is refused: tensors of two devices in one operator (but for CPU scalars
// and CPU indices), generators of the CPU, reading values through numpy. What makes the host wait on CUDA is counted.

#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <malloc.h>

#include <atomic>
#include <map>
#include <set>

namespace {

using at::Tensor;
const at::Device kSecond(at::kPrivateUse1, 0);
const at::DispatchKeySet kKeys(at::DispatchKey::PrivateUse1);
std::atomic<int64_t> to_host{0}, from_host{0};

// ---- memory

std::atomic<int64_t> allocated{0};  // bytes of tensors that were made here or copied to here; not of operators' results

void release(void* data) {
  allocated -= malloc_usable_size(data);
  std::free(data);
}

struct Malloc final : at::Allocator {
  at::DataPtr allocate(size_t n) override {
    void* data = n ? std::malloc(n) : nullptr;
    TORCH_CHECK(data || !n, "second: out of memory");
    allocated += malloc_usable_size(data);
    return {data, data, &release, kSecond};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* dest, const void* src, size_t n) const override { std::memcpy(dest, src, n); }
};
Malloc memory;

Tensor over(at::Storage storage, const Tensor& like, at::DispatchKeySet keys) {
  auto out = at::detail::make_tensor<at::TensorImpl>(std::move(storage), keys, like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}

// The memory of `from` as a storage of another device, which keeps it alive.
at::Storage shared(const at::Storage& from, at::Device device, at::Allocator* allocator) {
  at::DataPtr data(from.mutable_data(), new at::Storage(from), [](void* kept) { delete static_cast<at::Storage*>(kept); }, device);
  return {at::Storage::use_byte_size_t(), from.nbytes(), std::move(data), allocator, allocator != nullptr};
}

bool is_ours(const Tensor& t) { return t.defined() && t.is_privateuseone(); }
Tensor host(const Tensor& t) {
  return is_ours(t) ? over(shared(t.storage(), at::kCPU, nullptr), t, at::DispatchKeySet(at::DispatchKey::CPU)) : t;
}
Tensor adopted(const Tensor& t) { return t.defined() && t.is_cpu() ? over(shared(t.storage(), kSecond, &memory), t, kKeys) : t; }

// ---- random numbers: a CPU generator that says that it is none

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;
  explicit Generator(at::Generator cpu) : GeneratorImpl(kSecond, kKeys), cpu(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(cpu.clone()); }
};

at::Generator fresh() { return at::make_generator<Generator>(at::detail::createCPUGenerator()); }
const at::Generator& standard() {
  static const at::Generator one = fresh();
  return one;
}

// ---- what torch asks of a device

struct Guard final : c10::impl::NoOpDeviceGuardImpl<at::kPrivateUse1> {
  at::Device exchangeDevice(at::Device) const override { return kSecond; }
  at::Device getDevice() const override { return kSecond; }
  at::Stream getStream(at::Device) const noexcept override { return at::Stream(at::Stream::DEFAULT, kSecond); }
  at::Stream getNewStream(at::Device, int = 0) const override { return at::Stream(at::Stream::DEFAULT, kSecond); }
  at::Stream exchangeStream(at::Stream) const noexcept override { return at::Stream(at::Stream::DEFAULT, kSecond); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override { return standard(); }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return fresh(); }
  void resizePrivateUse1Bytes(const at::Storage& storage, size_t size) const override {
    at::DataPtr data = memory.allocate(size);
    if (size_t kept = std::min(size, storage.nbytes())) memory.copy_data(data.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// ---- every operator that has no kernel of its own

using Written = std::vector<std::pair<Tensor, Tensor>>;  // what was given to be written to, and what the CPU wrote to

// An argument for the CPU's kernel. `alone`: not in a list, so that a scalar of the CPU is allowed.
Tensor lent(const c10::OperatorHandle& op, const Tensor& t, bool writes, bool alone, Written& written) {
  if (!t.defined()) return t;
  if (t.is_cpu()) {
    TORCH_CHECK(alone && !writes && t.dim() == 0, "Expected all tensors to be on the same device, but found at least two, ", kSecond,
        " and cpu! (", op.schema().name(), ")");
    return t;
  }
  if (!is_ours(t)) return t;
  Tensor on_cpu = writes && !t.numel() ? at::empty(t.sizes(), t.options().device(at::kCPU)) : host(t);  // empty: it will be resized
  if (writes) written.emplace_back(t, on_cpu);
  return on_cpu;
}

c10::IValue argument(const c10::OperatorHandle& op, const c10::IValue& value, bool writes, bool indices, Written& written) {
  if (value.isTensor()) return lent(op, value.toTensor(), writes, true, written);
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& t : value.toTensorVector()) out.push_back(lent(op, t, writes, false, written));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& t : value.toOptionalTensorList()) {
      if (t && is_ours(*t) && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) to_host++;  // how many are true
      out.push_back(t && !(indices && t->is_cpu()) ? std::optional<Tensor>(lent(op, *t, writes, false, written)) : t);
    }
    return out;
  }
  if (value.isDevice()) return at::Device(at::kCPU);
  if (!value.isGenerator()) return value;
  const at::Generator& generator = value.toGenerator();
  TORCH_CHECK(!generator.defined() || generator.device() == kSecond, "Expected a 'second' device type for generator but found '",
      generator.device(), "'");
  return generator.defined() ? static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu : generator;
}

c10::IValue result(const c10::IValue& value, const Written& written) {
  if (value.isTensor()) {
    for (const auto& [given, used] : written)
      if (value.toTensor().is_same(used)) return given;
    return adopted(value.toTensor());
  }
  if (!value.isTensorList()) return value;
  c10::List<Tensor> out;
  for (const Tensor& t : value.toTensorVector()) out.push_back(adopted(t));
  return out;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> waits{"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::repeat_interleave", "aten::linalg_svd", "aten::_linalg_svd", "aten::_linalg_eigh"};
  const auto& schema = op.schema();
  const size_t begin = stack->size() - schema.arguments().size();
  const bool indices = schema.name().find("index") != std::string::npos;
  static const std::map<std::string, size_t> one_type{{"aten::mse_loss", 0}, {"aten::convolution", 0}, {"aten::convolution_backward", 1}};
  if (auto found = one_type.find(schema.name()); found != one_type.end()) {  // the CPU takes two types here
    const auto& first = (*stack)[begin + found->second].toTensor(), second = (*stack)[begin + found->second + 1].toTensor();
    TORCH_CHECK(first.scalar_type() == second.scalar_type(), schema.name(), ": input type ", first.scalar_type(), " and weight or target type ",
        second.scalar_type(), " should be the same");
  }
  Written written;
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    auto& value = (*stack)[begin + i];
    value = argument(op, value, alias && alias->isWrite(), indices, written);
  }
  if (waits.count(schema.name())) to_host++;
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(at::DispatchKeySet(at::DispatchKey::CPU), stack);
  for (const auto& [given, used] : written) {
    if (used.sizes() == given.sizes()) continue;
    at::native::resize_output(given, used.sizes());
    host(given).copy_(used);
  }
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); i++) {
    const auto* alias = schema.returns()[i].alias_info();
    TORCH_CHECK(!alias || alias->isWrite(), "second: ", schema.operator_name(), " gives a view, and has no kernel here");
    auto& value = (*stack)[first + i];
    if (value.isBool() || value.isInt() || value.isDouble()) to_host++;  // the host has to know
    value = result(value, written);
  }
}

// ---- operators of its own: making tensors, looking at them otherwise, copying them

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, at::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, at::dtype_or_default(dtype));
}
Tensor view_as(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, int64_t offset) {
  Tensor out = at::detail::make_tensor<at::TensorImpl>(at::TensorImpl::VIEW, at::Storage(self.storage()), self.key_set(), self.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return out;
}
Tensor like(const Tensor& self, const Tensor& form) { return view_as(self, form.sizes(), form.strides(), form.storage_offset()); }
Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return view_as(self, size, stride, offset.value_or(self.storage_offset()));
}
Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return view_as(self, size, stride, self.storage_offset());
}
Tensor view(const Tensor& self, at::IntArrayRef size) { return like(self, host(self).view(size)); }
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) { return like(self, host(self).unfold(dim, size, step)); }
Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  TORCH_CHECK(is_ours(self) || is_ours(to));
  if (to.is_cpu()) to_host++;
  if (self.is_cpu()) from_host++;
  at::AutoDispatchBelowADInplaceOrView below;
  host(to).copy_(host(self));
  return to;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  at::native::resize_output(to, self.sizes());
  return copy_from(self, to, false);
}
at::Scalar item(const Tensor& self) {
  to_host++;
  return host(self).item();
}
const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}
Tensor& set_storage_at(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}
Tensor& set_storage(Tensor& self, at::Storage storage) {
  const int64_t n = storage.nbytes() / self.itemsize();
  return set_storage_at(self, std::move(storage), 0, {n}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage_at(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}
Tensor& set_nothing(Tensor& self) { return set_storage(self, at::Storage(at::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true)); }

int64_t attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // written out: softmax of a product
}

const auto boxed = [] { return torch::CppFunction::makeFromBoxedFunction<&on_cpu>(); };

}  // namespace

namespace at {
REGISTER_ALLOCATOR(kPrivateUse1, &memory);
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}  // namespace at
namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(boxed()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("unfold", unfold);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("_fused_sdp_choice", attention);
  // torch has kernels for any device here that ask for a backend's own, or that round otherwise than the CPU's
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm", "native_layer_norm", "mse_loss"}) m.impl(name, boxed());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("to_host", [] { return to_host.load(); });
  m.def("from_host", [] { return from_host.load(); });
  m.def("allocated", [] { return allocated.load(); });
  m.def("generator", [] { return standard(); });
}
