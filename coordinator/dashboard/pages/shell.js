// What every page of a run has: the run's name, whether the page is live, and the field for the server's key.
import {at, setText} from "./parts.js";
import {showLive} from "./live.js";
import {setKey} from "./server.js";

const UNAUTHORIZED = 401;

function lock(locked) {
  at("key-form").hidden = !locked;
  document.body.classList.toggle("locked", locked);
}

// Calls `show` with every overview. Raises nothing: what goes wrong is told in the header, and tried again.
export function begin(show) {
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(at("key").value.trim());
    location.reload();
  });
  showLive(
    (overview) => {
      lock(false);
      document.querySelectorAll("[data-run]").forEach((element) => setText(element, overview.run_id));
      show(overview);
    },
    (error) => {
      if (error.status !== UNAUTHORIZED) return null;
      lock(true);
      return "locked";
    },
  );
}
