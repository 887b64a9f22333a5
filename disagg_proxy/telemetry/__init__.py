"""Telemetry: a record of each request, the event log, and everything derived from them.

``request_record``, ``request_recorder``   the life of one request; totals over all requests
``stats``, ``timeseries``   counters and histograms since the start; the last ten minutes in 5 s steps
``event_log``, ``instance_events``   the newest records and events; which changes of instances are events
``aggregate``, ``page_state``   totals, records and events of all workers, merged
``stats_report``, ``metrics``, ``page_view``   ``/stats``, ``/metrics`` and the live page, read through ``proxy_state``
``access_log``, ``tracing``, ``logs``   JSON lines per request, OpenTelemetry spans, the format of log lines

Telemetry only observes: no request waits for it. Records hold no prompt, no API key and no client address.
"""
