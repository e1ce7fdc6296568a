"""Downloads from a server that misbehaves, by a client that is killed: never a wrong byte, exit status tells."""

import random
from collections.abc import Callable

from bench.torture.bad_hub import NAMES, shards
from bench.torture.judge import SURVIVED, Verdict, changed, lost
from bench.torture.kills import keep, last_line
from bench.torture.lab import Lab
from bench.torture.processes import Hung

FETCH = ["-m", "nanochat.dataset", "-n", "3", "-w", "2"]
USUAL = 20.0  # seconds, most of them waits between attempts


def downloads(lab: Lab, rng: random.Random, name: str, tell: Callable[[str], None]) -> Verdict:
    """Fetch shards, with up to two kills, until the command says that they are there."""
    room = lab.empty_room(name)
    seed = rng.randrange(1 << 30)
    place = room.base.with_name("hub")
    place.mkdir()
    server = room.start(["-m", "bench.torture.bad_hub", str(place), str(seed)])
    if not server.until((place / "port").exists, 60):
        raise RuntimeError(f"the server did not start: {server.text()}")
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{(place / 'port').read_text()}", "NO_PROXY": "127.0.0.1",
           "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    wanted, folder, kills, ends = shards(seed), room.base / "base_data", rng.randrange(3), []
    for turn in range(6):
        if turn == 4:
            (place / "good").touch()
        life = room.start(FETCH, env=env)
        if kills and life.last(rng.uniform(0.1, 1.5)):
            kills -= 1
            life.kill()
            code = -1
        else:
            try:
                code = room.end(life, USUAL)
            except Hung as error:
                return keep(room, lost(f"seed of the server {seed}: {error}"))
        ends.append("killed" if code < 0 else str(code))
        wrong = [shard for shard in NAMES if (folder / shard).exists()
                 and (folder / shard).read_bytes() != wanted[shard]]
        if wrong:
            return keep(room, changed(f"{wrong[0]} has other bytes than the server's, after {', '.join(ends)}"))
        if "Traceback" in life.text():
            return keep(room, changed(f"a traceback: {last_line(life)}"))
        if code == 0:
            missing = [shard for shard in NAMES if not (folder / shard).exists()]
            if missing:
                return keep(room, lost(f"exit code 0, and {missing[0]} is not there"))
            tell(f"exit codes {', '.join(ends)}")
            return Verdict(SURVIVED)
    return keep(room, lost(f"six calls did not fetch the shards, the last two from a good server: {last_line(life)}"))
