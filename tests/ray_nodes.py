"""A Ray cluster on this machine, for tests: `python ray_nodes.py CPUS...`, a node for each number.

It prints its address. A line on stdin takes the last node down and is answered by a line. The end of stdin is
the cluster's end.
"""

import logging
import os
import sys


def main() -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    logging.disable(logging.CRITICAL)
    first, *others = map(int, sys.argv[1:])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": first, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=cpus) for cpus in others]
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        print(len(nodes), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
