"""Building corpora: web pages, archives and published records -> filtered samples -> WebDataset shards.

    source files --plan--> parts --build_part--> part tar + part.json     (one Ray Data task a part)
                                     |
                  near-duplicate documents over all parts, layout of the shards   (small, in the driver)
                                     |
                                  shard tasks --> shard tars --> index.json, last

Every step is a pure function of its input files and the configuration, and leaves a file that says it is done.
So a build that was killed goes on where it was, and its bytes do not depend on how many workers there are.
Nothing here knows Ray (`jobs.build` does) and nothing opens a network connection.
"""
