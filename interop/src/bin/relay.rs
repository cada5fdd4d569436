//! The relay that privstack-relay replaced, as far as measuring needs it: rust-libp2p with
//! QUIC, circuit relay, kad in server mode and identify, with their defaults.
//!
//! It takes --port PORT and prints the banner that the tests read.

use std::{env, error::Error, io::Write, time::Duration};

use futures::StreamExt;
use libp2p::{
    Multiaddr, SwarmBuilder, identify, kad,
    multiaddr::Protocol,
    relay,
    swarm::{NetworkBehaviour, SwarmEvent},
};

#[derive(NetworkBehaviour)]
struct Behaviour {
    relay: relay::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
    identify: identify::Behaviour,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port: u16 = match env::args().nth(1).zip(env::args().nth(2)) {
        Some((flag, port)) if flag == "--port" => port.parse()?,
        _ => return Err("usage: relay --port PORT".into()),
    };
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_quic()
        .with_behaviour(|key| {
            let id = key.public().to_peer_id();
            let mut config = kad::Config::new(kad::PROTOCOL_NAME);
            config.set_query_timeout(Duration::from_secs(60));
            let mut kad =
                kad::Behaviour::with_config(id, kad::store::MemoryStore::new(id), config);
            kad.set_mode(Some(kad::Mode::Server));
            let identify = identify::Config::new("/privstack/relay/1.0.0".into(), key.public())
                .with_agent_version("privstack-relay/0.1.0".into());
            Behaviour {
                relay: relay::Behaviour::new(id, relay::Config::default()),
                kad,
                identify: identify::Behaviour::new(identify),
            }
        })?
        // The clients of a benchmark are idle while others join.
        .with_swarm_config(|c| c.with_idle_connection_timeout(Duration::from_secs(600)))
        .build();
    let any: Multiaddr = format!("/ip4/0.0.0.0/udp/{port}/quic-v1").parse()?;
    swarm.listen_on(any)?;
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::NewListenAddr { address, .. } if is_loopback(&address) => {
                let id = swarm.local_peer_id();
                println!("  PeerId:    {id}\n  Bootstrap: {address}/p2p/{id}");
                println!("  Identity:  none, it is not asked");
                std::io::stdout().flush()?;
            }
            // So it names clients that kad would not learn of otherwise.
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                peer_id,
                info,
                ..
            })) => {
                for addr in info.listen_addrs {
                    swarm.behaviour_mut().kad.add_address(&peer_id, addr);
                }
            }
            _ => {}
        }
    }
}

fn is_loopback(addr: &Multiaddr) -> bool {
    addr.iter()
        .any(|p| matches!(p, Protocol::Ip4(ip) if ip.is_loopback()))
}
