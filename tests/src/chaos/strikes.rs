//! Carrying a fault out, and mending what lasts only a while.

use std::time::Duration;

use schema::PriorityBand;

use super::crew::Crew;
use super::plan::Fault;
use crate::broker::Broker;
use crate::proxy::Mode;

/// A server that was crashed has so long to come back on a busy machine.
const RESTART_LIMIT: Duration = Duration::from_secs(240);

/// Breaks what `fault` says and returns when it is over.
pub async fn strike(crew: &Crew, fault: Fault) {
    match fault {
        Fault::Kill(member, pause) => crew.kill(member, pause).await,
        Fault::Stop(member) => crew.replace(member).await,
        Fault::Freeze(member, pause) => crew.freeze(member, pause).await,
        Fault::Link(member, wall, mode, lasts) => {
            let Some(link) = crew.link(member, wall) else { return };
            if mode == Mode::Refuse {
                link.down();
            } else {
                link.set(mode);
            }
            tokio::time::sleep(lasts).await;
            // What was done unheard stays unheard.
            if mode == Mode::HoldAnswers {
                link.cut();
            }
            link.heal();
        }
        Fault::Cut(member, wall) => {
            if let Some(link) = crew.link(member, wall) {
                link.cut();
            }
        }
        Fault::Store(fault, percent, lasts) => {
            crew.front.set(fault, percent);
            tokio::time::sleep(lasts).await;
            crew.front.heal();
        }
        Fault::RestartBroker => {
            let servers = crew.servers().await;
            servers.broker_answers(RESTART_LIMIT).await;
            servers.restart_broker(RESTART_LIMIT).await;
        }
        Fault::RestartPostgres => crew.servers().await.restart_postgres(RESTART_LIMIT).await,
        Fault::WipeBroker => {
            let servers = crew.servers().await;
            servers.broker_answers(RESTART_LIMIT).await;
            let Some(broker) = Broker::try_of(&crew.fleet).await else { return };
            for &band in PriorityBand::ALL {
                broker.try_delete(&crew.fleet.queue(band)).await;
            }
        }
    }
}
