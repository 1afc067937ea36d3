"""Tracking services: what a run tells them, and how a service that does not answer is borne."""
