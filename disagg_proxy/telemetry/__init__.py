"""What can be seen of the proxy at work: one record for each request, events, and what is made from them.

``record``, ``recorder``   one request; its opening, its end, what it adds to the totals
``journal``, ``happenings``   the newest records and events; which changes of instances are events
``meter``   the last minutes in steps of 5 s
``news``   the above from all workers of a proxy
``aggregate``   the totals from all workers of a proxy
``report``, ``metrics``, ``view``   /stats, /metrics and everything that a page shows; they read the proxy through the
interface in ``proxy_state``

Nothing here is asked by a request's way: it is told. Records hold no prompt, no key and no address of a client.
"""
