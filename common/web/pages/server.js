// Asking the page's own server, with its key if it has one, and following what it tells as it comes.
const KEY = "kilohive-key";
const SILENCE_MS = 25000;
const FIRST_RETRY_MS = 500,
  LAST_RETRY_MS = 15000;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? {Authorization: "Bearer " + key} : {};
};

export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function answer(path, signal, more = {}) {
  const {headers: added, ...how} = more;
  const response = await fetch(path, {headers: {...headers(), ...added}, signal, cache: "no-store", ...how});
  if (response.ok) return response;
  const problem = await response.json().catch(() => null);
  throw new Refused(response.status, problem?.error?.message ?? `the server answers ${response.status}`);
}

export async function ask(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  return (await answer("api/" + path + (query ? "?" + query : ""), AbortSignal.timeout(15000))).json();
}

export async function download(path) {
  return (await answer("api/" + path, AbortSignal.timeout(60000))).blob();
}

// Has something done; `headers` may prove who asks.
export async function tell(path, body, headers = {}) {
  const how = {method: "POST", headers: {"Content-Type": "application/json", ...headers}, body: JSON.stringify(body)};
  return (await answer("api/" + path, AbortSignal.timeout(65000), how)).json();
}

const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

// Calls `heard` with all that is told, and `lost` with why none comes; asks again by itself, later each time.
export async function follow(heard, lost) {
  let retry = FIRST_RETRY_MS;
  for (;;) {
    try {
      await followOnce((told) => {
        retry = FIRST_RETRY_MS;
        heard(told);
      });
      lost(new Refused(0, "the server has ended the connection"));
    } catch (error) {
      lost(error instanceof Refused ? error : new Refused(0, "the server does not answer"));
    }
    await pause(retry * (0.75 + Math.random() / 2));
    retry = Math.min(2 * retry, LAST_RETRY_MS);
  }
}

async function followOnce(heard) {
  const stopping = new AbortController();
  let watch = setTimeout(() => stopping.abort(), SILENCE_MS);
  try {
    const response = await answer("api/events", stopping.signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const {done, value} = await reader.read();
      if (done) return;
      clearTimeout(watch);
      watch = setTimeout(() => stopping.abort(), SILENCE_MS);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) heard(JSON.parse(data.slice(6)));
      }
    }
  } finally {
    clearTimeout(watch);
    stopping.abort();
  }
}
