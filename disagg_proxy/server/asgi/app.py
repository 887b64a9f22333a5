"""Putting the application together. Lifespan: the services start before the first request and stop after the last."""

from __future__ import annotations

from quart import Quart

from disagg_proxy.config import Config
from disagg_proxy.server.asgi.admin_routes import admin_routes
from disagg_proxy.server.asgi.auth import install_guard
from disagg_proxy.server.asgi.engine_routes import single_routes
from disagg_proxy.server.asgi.error_responses import install_error_handlers
from disagg_proxy.server.asgi.exchange_scope import ExchangeScopeMiddleware
from disagg_proxy.server.asgi.generation_routes import generation_routes
from disagg_proxy.server.asgi.page_routes import page_routes
from disagg_proxy.server.asgi.status_routes import status_routes
from disagg_proxy.services import Services


def create_app(config: Config, services: Services | None = None) -> Quart:
    """The ASGI application.

    Args:
        services: the parts to use; made from ``config`` when left out.

    Raises:
        BindError: ``services`` was left out and the registration port cannot be opened.
    """
    parts = services or Services(config)
    app = Quart("disagg_proxy", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.config["BODY_TIMEOUT"] = config.body_timeout
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.url_map.strict_slashes = False
    # A redirect would name whatever host the client made up.
    app.url_map.merge_slashes = False
    app = install_guard(app, config)
    install_error_handlers(app, config.max_body_bytes)
    app.register_blueprint(generation_routes(parts))
    app.register_blueprint(single_routes(parts))
    app.register_blueprint(status_routes(parts))
    app.register_blueprint(page_routes(parts))
    if config.admin_key:
        app.register_blueprint(admin_routes(parts))
    app.before_serving(parts.start)
    app.after_serving(parts.stop)
    app.asgi_app = ExchangeScopeMiddleware(app.asgi_app)  # type: ignore[method-assign]
    return app
