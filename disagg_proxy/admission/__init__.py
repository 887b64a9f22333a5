"""Admission: limits on concurrent requests, the queue in front of them, and estimates of prompt sizes."""
