// What a browser downloads of an exported folder, and of the runtime, which all models share.
//
//   node download.mjs models small
//
// MB are 10^6 bytes: as the files are, and as a server sends them that compresses with gzip.

import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";

const [models, name] = process.argv.slice(2);
const folder = join(models, name);
const modules = join(import.meta.dirname, "node_modules");
const graphs = readdirSync(join(folder, "onnx")).filter((file) => file.endsWith(".onnx"));
const settings = ["tokenizer.json", "tokenizer_config.json", "config.json"];
const model = print("model", graphs.map((graph) => join(folder, "onnx", graph)));
const rest = print("tokenizer and settings", settings.map((file) => join(folder, file)));
print("together", [], model.map((size, at) => size + rest[at]));
print("runtime, apart", [
  join(modules, "@huggingface/transformers/dist/transformers.min.js"),
  ...["mjs", "wasm"].map((kind) => join(modules, `onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.${kind}`)),
]);

function print(what, files, sizes = [0, 0]) {
  for (const file of files.filter(existsSync)) {
    const content = readFileSync(file);
    sizes = [sizes[0] + content.length, sizes[1] + gzipSync(content).length];
  }
  const [plain, packed] = sizes.map((size) => (size / 1e6).toFixed(2));
  console.log(`${what}: ${plain} MB, gzip ${packed} MB`);
  return sizes;
}
