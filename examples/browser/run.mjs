// An exported folder in Node, with transformers.js and without a network.
//
//   compresskit export final/ --format onnx-int8 --layout hub --output models/small
//   cd examples/browser && npm install
//   node run.mjs ../../models small text-classification "a lovely film" "a waste of time"
//
// The second argument is a folder below the first one. Prints one JSON line a text.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [models, name, task, ...texts] = process.argv.slice(2);
env.localModelPath = models;
env.allowRemoteModels = false; // nothing but the folder is read
const dtype = ["quantized", "q4"].find((kind) => existsSync(join(models, name, "onnx", `model_${kind}.onnx`)));
const run = await pipeline(task, name, { dtype: { quantized: "q8", q4: "q4" }[dtype] ?? "fp32" });
const options = { "feature-extraction": { pooling: "mean", normalize: true }, "text-classification": { top_k: null } };
for (const text of texts) {
  const found = await run(text, options[task] ?? {});
  console.log(JSON.stringify(found.tolist ? found.tolist() : found));
}
