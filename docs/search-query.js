// SPDX-License-Identifier: Apache-2.0
// What is typed becomes a query: a leading "-" would mean "without" to the search, and words such as "to" find all of "token".
{
  const QUERY = 2; // the theme's type of a message that carries a query
  const COMMON = /^(a|an|and|are|can|do|does|for|how|i|in|is|it|my|of|on|the|to|what|when|where|which|with)$/i;
  const send = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (message, ...rest) {
    if (message && message.type === QUERY && typeof message.data === "string") {
      const words = message.data.split(/\s+/).map((word) => word.replace(/^[-+~^:]+/, "")).filter(Boolean);
      const rare = words.filter((word) => !COMMON.test(word));
      message = { ...message, data: (rare.length ? rare : words).join(" ") };
    }
    return send.call(this, message, ...rest);
  };
}
