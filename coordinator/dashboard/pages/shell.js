// What every page has: the run's name, whether the page is live, and the field for the server's key.
import {at, setText} from "./parts.js";
import {timeOfDay} from "./format.js";
import {follow, setKey} from "./server.js";

const LATE_S = 8;
const UNAUTHORIZED = 401;
const CONNECTING = "connecting";

function lock(locked) {
  at("key-form").hidden = !locked;
  document.body.classList.toggle("locked", locked);
}

// Calls `show` with every overview. Raises nothing: what goes wrong is told in the header, and tried again.
export function begin(show) {
  let heardAt = null;
  let problem = CONNECTING;
  const tell = () => {
    const age = heardAt === null ? Infinity : (performance.now() - heardAt) / 1000;
    const live = !problem && age < LATE_S;
    at("state").dataset.is = live ? "live" : heardAt === null && problem === CONNECTING ? "" : "late";
    const since = heardAt === null ? "" : `, as of ${timeOfDay(Date.now() / 1000 - age)}`;
    setText(at("state"), live ? "live" : `${problem || "waiting"}${since}`);
  };
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(at("key").value.trim());
    location.reload();
  });
  setInterval(tell, 1000);
  follow(
    (overview) => {
      heardAt = performance.now();
      problem = overview.problem;
      lock(false);
      document.querySelectorAll("[data-run]").forEach((element) => setText(element, overview.run_id));
      show(overview);
      tell();
    },
    (error) => {
      problem = error.message;
      if (error.status === UNAUTHORIZED) {
        problem = "locked";
        lock(true);
      }
      tell();
    },
  );
  tell();
}
