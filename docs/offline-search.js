// SPDX-License-Identifier: Apache-2.0
// Browsers start no worker for a page on the disk. There the search runs in a frame of the page that looks like one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inner = frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source !== this.inner) return;
        const copy = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(copy);
        if (this.onmessage) this.onmessage(copy);
      });
      this.ready = new Promise((resolve) => {
        const page = this.inner.document;
        page.open();
        page.write("<!doctype html><body></body>");
        page.close();
        const say = page.createElement("script");
        say.textContent =
          "window.postMessage = (data) => parent.postMessage(data, '*');" +
          "window.importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done, failed) => {" +
          "const part = document.body.appendChild(document.createElement('script'));" +
          "part.onload = done; part.onerror = failed; part.src = url; })));";
        page.body.appendChild(say);
        const script = page.createElement("script");
        script.onload = resolve;
        script.src = new URL(url, location.href).href;
        page.body.appendChild(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data })));
    }
    terminate() {}
  };
}
