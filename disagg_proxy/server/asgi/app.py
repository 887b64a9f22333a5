"""Assembles the application. Its lifespan starts the services before the first request, and stops them at the end."""

from __future__ import annotations

from quart import Quart

from disagg_proxy.config import Config
from disagg_proxy.server.asgi.admin_routes import admin_routes
from disagg_proxy.server.asgi.auth import install_auth
from disagg_proxy.server.asgi.engine_routes import engine_routes
from disagg_proxy.server.asgi.error_responses import install_error_handlers
from disagg_proxy.server.asgi.exchange_scope import ExchangeScopeMiddleware
from disagg_proxy.server.asgi.generation_routes import generation_routes
from disagg_proxy.server.asgi.page_routes import page_routes
from disagg_proxy.server.asgi.status_routes import status_routes
from disagg_proxy.services import Services


def create_app(config: Config, services: Services | None = None) -> Quart:
    """The ASGI application.

    Args:
        services: created from ``config`` if None.

    Raises:
        BindError: ``services`` is None and the registration port cannot be opened.
    """
    parts = services or Services(config)
    app = Quart("disagg_proxy", static_folder=None)

    def reconfigure(config: Config) -> None:
        app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
        app.config["BODY_TIMEOUT"] = config.body_timeout

    reconfigure(config)
    parts.reloads.on_config(reconfigure)
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.url_map.strict_slashes = False
    # A redirect would contain the Host header, which the client chooses.
    app.url_map.merge_slashes = False
    app = install_auth(app, config, parts.keys)
    install_error_handlers(app)
    app.register_blueprint(generation_routes(parts))
    app.register_blueprint(engine_routes(parts))
    app.register_blueprint(status_routes(parts))
    app.register_blueprint(page_routes(parts))
    if config.admin_key:
        app.register_blueprint(admin_routes(parts))
    app.before_serving(parts.start)
    app.after_serving(parts.stop)
    app.asgi_app = ExchangeScopeMiddleware(app.asgi_app)  # type: ignore[method-assign]
    return app
