// node node.mjs FOLDER < job.json : FOLDER has node_modules with @huggingface/transformers in it.

import { existsSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

import { tried } from "./embed.mjs";

const packages = join(resolve(process.argv[2]), "node_modules");
const library = join(packages, "@huggingface", "transformers", "dist", "transformers.node.mjs");
let answer = { missing: "@huggingface/transformers" };
if (existsSync(library)) {
  answer = await tried(await import(pathToFileURL(library)), JSON.parse(readFileSync(0, "utf8")), "cpu");
  const runtime = JSON.parse(readFileSync(join(packages, "onnxruntime-node", "package.json"), "utf8"));
  answer.versions["onnxruntime-node"] = runtime.version;
}
process.stdout.write(`\n${JSON.stringify(answer)}\n`, () => process.exit(0));
