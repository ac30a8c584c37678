// A device that is none: tensors of device type PrivateUse1 whose memory is the host's.
//
// Every operation copies its tensors to the CPU and back (torch's own fallback), but for those
// that PyTorch asks of a backend. What is like a GPU is what a library has to get right on one:
// tensors of two devices do not mix, autograd calls nodes in a thread of the device, autocast
// has rules of its own, attention and LSTM cells are fused, and the latter's backward pass has
// no derivative.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = c10::IntArrayRef;

constexpr auto PRETEND = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex how_many() {
  static const char* told = std::getenv("PRETEND_DEVICES");
  return told ? static_cast<c10::DeviceIndex>(std::atoi(told)) : 1;
}

// What PyTorch asks of a device -----------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes && posix_memalign(&data, 64, bytes)) throw std::bad_alloc();
    return {data, data, &std::free, c10::Device(PRETEND, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(PRETEND, &memory);

// Work is done when a call returns, so that streams and events have nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = PRETEND;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override { return PRETEND; }
  c10::DeviceIndex deviceCount() const noexcept override { return how_many(); }
  c10::Device getDevice() const override { return {PRETEND, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(PRETEND, current);
    current = device.index();
    return before;
  }
  c10::Stream getStream(c10::Device device) const noexcept override { return only(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return only(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return only(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream only(c10::Device device) {
    auto index = device.index() < 0 ? current : device.index();
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(PRETEND, index));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  // Torch 2.6 does not ask these two.
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::DeviceIndex deviceCount() const override { return how_many(); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current, device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// Tensors: made, seen otherwise, copied ---------------------------------------------------------

Tensor host(const Tensor& t) {  // the same memory, as the CPU sees it
  if (!t.defined() || t.is_cpu()) return t;
  auto options = t.options().device(at::kCPU);
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), options);
}

Maybe host(const Maybe& t) { return t && t->defined() ? Maybe(host(*t)) : std::nullopt; }

Tensor back(const Tensor& t, const Tensor& like) { return t.defined() ? t.to(like.device()) : t; }

Tensor empty(Sizes sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device> device, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes sizes, Sizes strides, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device,
                     std::optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, type);
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  auto from = host(source);
  if (source.is_conj()) from = from.conj();
  if (source.is_neg()) from = from._neg_view();
  host(target).copy_(from);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  at::native::resize_(target, source.sizes(), std::nullopt);
  return copy_from(source, target, false);
}

c10::Scalar number(const Tensor& t) { return at::native::_local_scalar_dense_cpu(host(t)); }

Tensor as_strided(const Tensor& t, Sizes sizes, Sizes strides, std::optional<int64_t> offset) {
  return at::cpu::as_strided(t, sizes, strides, offset);
}

const Tensor& resize(const Tensor& t, c10::SymIntArrayRef sizes,
                     std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(sizes), format);
}

Tensor reshape_alias(const Tensor& t, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  auto shape = C10_AS_INTARRAYREF_SLOW(sizes);
  return at::native::_reshape_alias(t, shape, C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor view(const Tensor& t, c10::SymIntArrayRef sizes) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor alias(const Tensor& t) { return at::native::alias(t); }

Tensor unfold(const Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}

Tensor& set_tensor(Tensor& t, const Tensor& source) { return at::native::set_tensor_(t, source); }

Tensor& set_storage(Tensor& t, at::Storage source) { return at::native::set_(t, source); }

Tensor& set_storage_at(Tensor& t, at::Storage source, int64_t offset, Sizes sizes, Sizes strides) {
  return at::cpu::set_(t, source, offset, sizes, strides);
}

// Operations that a backend is asked for --------------------------------------------------------

Tensor convolution(const Tensor& input, const Tensor& weight, const Maybe& bias, Sizes stride,
                   Sizes padding, Sizes dilation, bool transposed, Sizes output_padding,
                   int64_t groups) {
  auto output = at::convolution(host(input), host(weight), host(bias), stride, padding, dilation,
                                transposed, output_padding, groups);
  return back(output, input);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, Sizes stride, Sizes padding,
    Sizes dilation, bool transposed, Sizes output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [a, b, c] = at::convolution_backward(host(gradient), host(input), host(weight),
                                            Sizes(channels), stride, padding, dilation, transposed,
                                            output_padding, groups, wanted);
  return {back(a, input), back(b, input), back(c, input)};
}

int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const Maybe&, double dropout,
                         bool, std::optional<double>, bool) {
  const bool fused = at::globalContext().userEnabledFlashSDP() && dropout == 0;
  return static_cast<int64_t>(fused ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>
attention(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& mask,
          double dropout, bool causal, bool, std::optional<double> scale) {
  auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      host(query), host(key), host(value), dropout, causal, host(mask), scale);
  auto seed = at::empty({}, at::dtype(at::kLong));
  return {back(output, query), back(sums, query), Tensor(), Tensor(), query.size(2), key.size(2),
          seed, seed.clone(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& mask, std::array<bool, 4>, const Tensor& output, const Tensor& sums,
    const Tensor&, const Tensor&, int64_t, int64_t, double dropout, bool causal, const Tensor&,
    const Tensor&, std::optional<double> scale) {
  auto [a, b, c] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      host(gradient), host(query), host(key), host(value), host(output), host(sums), dropout,
      causal, host(Maybe(mask)), scale);
  return {back(a, query), back(b, query), back(c, query), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& from_input, const Tensor& from_state,
                                             const Tensor& cell, const Maybe& bias,
                                             const Maybe& state_bias) {
  auto sums = host(from_input) + host(from_state);
  for (const auto& b : {host(bias), host(state_bias)})
    if (b) sums = sums + *b;
  auto gates = sums.chunk(4, 1);
  auto in = gates[0].sigmoid(), forget = gates[1].sigmoid(), out = gates[3].sigmoid();
  auto update = gates[2].tanh();
  auto next = forget * host(cell) + in * update;
  auto kept = at::cat({in, forget, update, out}, 1);
  return {back(out * next.tanh(), from_input), back(next, from_input), back(kept, from_input)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const Maybe& of_state, const Maybe& of_cell,
                                                      const Tensor& cell, const Tensor& next,
                                                      const Tensor& kept, bool has_bias) {
  auto gates = host(kept).chunk(4, 1);
  auto in = gates[0], forget = gates[1], update = gates[2], out = gates[3];
  auto bent = host(next).tanh();
  auto state = host(of_state).value_or(at::zeros_like(bent));
  auto of_next = host(of_cell).value_or(at::zeros_like(bent)) + state * out * (1 - bent * bent);
  auto sums = at::cat({of_next * update * in * (1 - in),
                       of_next * host(cell) * forget * (1 - forget),
                       of_next * in * (1 - update * update), state * bent * out * (1 - out)},
                      1);
  auto bias = has_bias ? back(sums.sum(0), cell) : Tensor();
  return {back(sums, cell), back(of_next * forget, cell), bias};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& from_input, const Tensor& from_state,
                                    const Tensor& state, const Maybe& bias,
                                    const Maybe& state_bias) {
  auto of_input = host(from_input), of_state = host(from_state);
  if (auto b = host(bias)) of_input = of_input + *b;
  if (auto b = host(state_bias)) of_state = of_state + *b;
  auto a = of_input.chunk(3, 1), b = of_state.chunk(3, 1);
  auto reset = (a[0] + b[0]).sigmoid(), keep = (a[1] + b[1]).sigmoid();
  auto update = (a[2] + reset * b[2]).tanh();
  auto next = update + keep * (host(state) - update);
  auto kept = at::cat({reset, keep, update, host(state), b[2]}, 1);
  return {back(next, from_input), back(kept, from_input)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& gradient,
                                                                     const Tensor& kept,
                                                                     bool has_bias) {
  auto saved = host(kept).chunk(5, 1);
  auto reset = saved[0], keep = saved[1], update = saved[2], state = saved[3], from = saved[4];
  auto g = host(gradient);
  auto of_update = g * (1 - keep) * (1 - update * update);
  auto of_keep = g * (state - update) * keep * (1 - keep);
  auto of_reset = of_update * from * reset * (1 - reset);
  auto of_input = at::cat({of_reset, of_keep, of_update}, 1);
  auto of_state = at::cat({of_reset, of_keep, of_update * reset}, 1);
  auto sum = [&](const Tensor& t) { return has_bias ? back(t.sum(0), kept) : Tensor(); };
  return {back(of_input, kept), back(of_state, kept), back(g * keep, kept), sum(of_input),
          sum(of_state)};
}

void by_the_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("alias", alias);
  m.impl("unfold", unfold);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_at);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", number);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_fused_sdp_choice", attention_choice);
  m.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", attention_backward);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}

// Autocast: products in half precision, normalisations and losses in float32 --------------------

#define HALF(name) KERNEL_PRIVATEUSEONE(name, lower_precision_fp)
#define FULL(name) KERNEL_PRIVATEUSEONE(name, fp32)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  HALF(linear)
  HALF(matmul)
  HALF(mm)
  HALF(bmm)
  HALF(addmm)
  HALF(conv1d)
  HALF(conv2d)
  HALF(convolution)
  HALF(scaled_dot_product_attention)
  FULL(layer_norm)
  FULL(group_norm)
  FULL(nll_loss)
  FULL(mse_loss)
  FULL(cross_entropy_loss)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_choice);
}
