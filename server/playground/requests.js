// Requests to the server this page came from. Errors carry the server's own words.

let key = "";

/** Sent with every request from now on; kept in memory only. */
export function setKey(value) {
  key = value.trim();
}

function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export async function getJson(path) {
  const response = await fetch(path, { headers: headers() });
  const content = await response.json();
  if (!response.ok && content.error) throw new Error(content.error.message);
  return content;
}

/** Yields the parsed events of a stream; throws the server's own words on failure. */
export async function* events(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
