// Reads a prompt by one compiled program and decodes by another, without Python (docs/export.md).
//
//     decode read.pt2 step.pt2 tensors.pt outputs.pt PROMPT
//
// read.pt2, step.pt2: packages of torch._inductor.aoti_compile_and_package.  Both take hidden states and the tensors of a
//     state, and return the output and the tensors of the next state.
// tensors.pt: a list saved by torch.save: hidden states [B, N, hidden_size], then the tensors of the first state in order.
// outputs.pt: a tuple for torch.load: outputs [B, N, hidden_size], then the tensors of the last state.
// PROMPT: the number of tokens that read.pt2 takes at once; step.pt2 takes the others one by one.

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

using Tensors = std::vector<at::Tensor>;
using torch::inductor::AOTIModelPackageLoader;

Tensors load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const at::IValue list = torch::jit::pickle_load(bytes);
  Tensors tensors;
  for (const at::IValue& each : list.toListRef()) tensors.push_back(each.toTensor());
  return tensors;
}

void save(const Tensors& tensors, const std::string& path) {
  // A tuple, because torch.load reads no lists of tensors that C++ wrote.
  const std::vector<at::IValue> values(tensors.begin(), tensors.end());
  const auto bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream(path, std::ios::binary).write(bytes.data(), bytes.size());
}

// The output for these tokens.  `state` becomes the state after them.
at::Tensor advance(AOTIModelPackageLoader& program, const at::Tensor& tokens, Tensors& state) {
  Tensors inputs{tokens.contiguous()};  // a compiled program assumes the strides of its example
  inputs.insert(inputs.end(), state.begin(), state.end());
  Tensors results = program.run(inputs);
  state.assign(results.begin() + 1, results.end());
  return results[0];
}

int main(int count, char** arguments) {
  if (count != 6) return 1;
  AOTIModelPackageLoader read(arguments[1]), step(arguments[2]);
  Tensors state = load(arguments[3]);
  const at::Tensor hidden = state.front();
  state.erase(state.begin());
  const int64_t prompt = std::stol(arguments[5]);

  Tensors outputs{advance(read, hidden.narrow(1, 0, prompt), state)};
  for (int64_t token = prompt; token < hidden.size(1); ++token)
    outputs.push_back(advance(step, hidden.narrow(1, token, 1), state));

  Tensors results{at::cat(outputs, 1)};
  results.insert(results.end(), state.begin(), state.end());
  save(results, arguments[4]);
}
