//! A PrivStack client's network side, for the relay's tests: it joins, publishes
//! and looks for its sync group's record, connects to whom it finds, and syncs.
//!
//! In mode=deployed, the default, it does what the released clients do (DESIGN.md,
//! section 3) and has no other parts than they have. In mode=circuits it stands for
//! other libp2p software: it also seeks its mates by FIND_NODE, reserves a slot at the
//! relay (circuit=1), falls back to circuits, and punches holes (dcutr=1).
//!
//! Other arguments, all NAME=VALUE: relay (multiaddr with /p2p), code (the sync code),
//! device (its name), key (any text: the same text is the same peer ID; without one the
//! key is new), tick_ms (30000), listen (repeatable, or none), dial=0 (only find, send
//! nothing to mates).
//!
//! It prints one JSON object a line, each with "event", and takes commands on stdin:
//! `sync PEER BYTES` (which dials), `probe PEER BYTES` (which does not), `carry PEER
//! BYTES` (which does not, and says so), `find PEER`, `dial ADDR`, `put TEXT`. The end of
//! stdin ends it.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    hash::BuildHasher,
    io::{self, Write},
    time::{Duration, Instant, SystemTime},
};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, dcutr, identify,
    identity::Keypair,
    kad,
    multiaddr::Protocol,
    noise, relay,
    request_response::{self, ProtocolSupport},
    swarm::{NetworkBehaviour, SwarmEvent, behaviour::toggle::Toggle, dial_opts::DialOpts},
    yamux,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader};

const SYNC_PROTOCOL: StreamProtocol = StreamProtocol::new("/privstack/sync/1.0.0");

/// The largest sync message (16 MiB), and a little.
const MAX_SYNC: u64 = (16 << 20) + 1024;

/// What a device that has nothing new says to its mates, in bytes.
const GREETING: usize = 1024;

/// How often a released client goes through the devices that it knows.
const LOOK: Duration = Duration::from_secs(5);

#[derive(NetworkBehaviour)]
struct Behaviour {
    identify: identify::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
    sync: request_response::Behaviour<SyncCodec>,
    relay: Toggle<relay::client::Behaviour>,
    dcutr: Toggle<dcutr::Behaviour>,
}

impl Behaviour {
    /// The parts that all modes have. `bootstrap` is where kad begins.
    fn new(key: &Keypair, device: &str, bootstrap: Option<(PeerId, Multiaddr)>) -> Self {
        let id = key.public().to_peer_id();
        let mut config = kad::Config::new(kad::PROTOCOL_NAME);
        config.set_query_timeout(Duration::from_secs(60));
        let mut kad = kad::Behaviour::with_config(id, kad::store::MemoryStore::new(id), config);
        kad.set_mode(Some(kad::Mode::Server)); // whatever the NAT
        if let Some((relay, addr)) = bootstrap {
            kad.add_address(&relay, addr);
            kad.bootstrap().expect("the relay is known");
        }
        let identify = identify::Config::new("/privstack/sync/1.0.0".into(), key.public())
            .with_agent_version(format!("PrivStack/{device}"));
        let sync =
            request_response::Config::default().with_request_timeout(Duration::from_secs(120));
        Behaviour {
            identify: identify::Behaviour::new(identify),
            kad,
            sync: request_response::Behaviour::new([(SYNC_PROTOCOL, ProtocolSupport::Full)], sync),
            relay: None.into(),
            dcutr: None.into(),
        }
    }
}

/// A request is any bytes, the response their SHA-256.
#[derive(Clone, Default)]
struct SyncCodec;

async fn read_block<T: AsyncRead + Unpin + Send>(io: &mut T) -> io::Result<Vec<u8>> {
    let mut length = [0; 8];
    io.read_exact(&mut length).await?;
    let length = u64::from_be_bytes(length);
    if length > MAX_SYNC {
        return Err(io::Error::other("message too long"));
    }
    let mut data = vec![0; length as usize];
    io.read_exact(&mut data).await?;
    Ok(data)
}

async fn write_block<T: AsyncWrite + Unpin + Send>(io: &mut T, data: &[u8]) -> io::Result<()> {
    io.write_all(&(data.len() as u64).to_be_bytes()).await?;
    io.write_all(data).await?;
    io.close().await
}

#[async_trait::async_trait]
impl request_response::Codec for SyncCodec {
    type Protocol = StreamProtocol;
    type Request = Vec<u8>;
    type Response = Vec<u8>;

    async fn read_request<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
    ) -> io::Result<Vec<u8>> {
        read_block(io).await
    }
    async fn read_response<T: AsyncRead + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
    ) -> io::Result<Vec<u8>> {
        read_block(io).await
    }
    async fn write_request<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        data: Vec<u8>,
    ) -> io::Result<()> {
        write_block(io, &data).await
    }
    async fn write_response<T: AsyncWrite + Unpin + Send>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        data: Vec<u8>,
    ) -> io::Result<()> {
        write_block(io, &data).await
    }
}

fn emit(event: &str, mut fields: Value) {
    fields["event"] = json!(event);
    let mut out = io::stdout().lock();
    // A test that has gone away reads no more: then there is nothing to say.
    if writeln!(out, "{fields}")
        .and_then(|()| out.flush())
        .is_err()
    {
        std::process::exit(0);
    }
}

fn is_circuit(addr: &Multiaddr) -> bool {
    addr.iter().any(|p| p == Protocol::P2pCircuit)
}

/// The addresses in a record's value, which is anybody's.
fn addresses_in(value: &[u8]) -> Vec<Multiaddr> {
    let value: Value = serde_json::from_slice(value).unwrap_or_default();
    let addresses = value["addresses"].as_array().into_iter().flatten();
    addresses.filter_map(|a| a.as_str()?.parse().ok()).collect()
}

/// What the command line says, and what is under way.
struct Client {
    relay_id: PeerId,
    relay_addr: Multiaddr,
    key: kad::RecordKey,
    device: String,
    circuits: bool, // the mode
    circuit: bool,
    dial: bool,
    reserved: bool,
    value: Option<String>,
    puts: HashMap<kad::QueryId, Instant>,
    gets: HashMap<kad::QueryId, Instant>,
    finds: HashMap<kad::QueryId, (PeerId, Instant)>,
    syncs: HashMap<request_response::OutboundRequestId, (Instant, Vec<u8>, usize)>,
    seeking: HashSet<PeerId>,
    /// The devices found so far, and whether each was sent a message.
    known: HashMap<PeerId, bool>,
}

impl Client {
    /// What a device does every 30 s.
    fn tick(&mut self, swarm: &mut Swarm<Behaviour>) {
        // A released client leaves it to kad to dial the relay.
        if self.circuits && !swarm.is_connected(&self.relay_id) {
            self.reserved = false;
            let opts = DialOpts::peer_id(self.relay_id)
                .addresses(vec![self.relay_addr.clone()])
                .build();
            if let Err(err) = swarm.dial(opts) {
                emit(
                    "dial_failed",
                    json!({"peer": self.relay_id.to_string(), "error": err.to_string()}),
                );
            }
            return;
        }
        let addresses: Vec<String> = swarm
            .listeners()
            .filter(|a| !is_circuit(a))
            .map(ToString::to_string)
            .collect();
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
        let value = self.value.clone().unwrap_or_else(|| {
            json!({"device_name": self.device, "addresses": addresses, "timestamp": now})
                .to_string()
        });
        let record = kad::Record {
            key: self.key.clone(),
            value: value.into_bytes(),
            publisher: None, // kad sets it, and keeps the record here, too
            expires: None,
        };
        match swarm
            .behaviour_mut()
            .kad
            .put_record(record, kad::Quorum::One)
        {
            Ok(id) => {
                self.puts.insert(id, Instant::now());
            }
            Err(err) => emit("put_failed", json!({"error": err.to_string()})),
        }
        let id = swarm.behaviour_mut().kad.get_record(self.key.clone());
        self.gets.insert(id, Instant::now());

        let greeted = self.known.iter().filter(|(_, greeted)| **greeted);
        for mate in greeted.map(|(mate, _)| *mate).collect::<Vec<_>>() {
            self.greet(swarm, mate);
        }
    }

    /// What a released client does every 5 s, and this one also when it has found
    /// a device: it sends a message to those that have not had one.
    fn look(&mut self, swarm: &mut Swarm<Behaviour>) {
        let new = self.known.iter().filter(|(_, greeted)| !**greeted);
        for mate in new.map(|(mate, _)| *mate).collect::<Vec<_>>() {
            self.known.insert(mate, true);
            self.greet(swarm, mate);
        }
    }

    fn greet(&mut self, swarm: &mut Swarm<Behaviour>, mate: PeerId) {
        emit("sent", json!({"peer": mate.to_string(), "bytes": GREETING}));
        self.sync(swarm, mate, GREETING);
    }

    /// Sends a message. If there is no connection, the swarm dials the mate at all
    /// addresses that it knows at this moment.
    fn sync(&mut self, swarm: &mut Swarm<Behaviour>, mate: PeerId, bytes: usize) {
        let data: Vec<u8> = (0..bytes).map(|i| (i * 31 + i / 251) as u8).collect();
        let digest = Sha256::digest(&data).to_vec();
        let id = swarm.behaviour_mut().sync.send_request(&mate, data);
        self.syncs.insert(id, (Instant::now(), digest, bytes));
    }

    /// A mate was found in a record.
    fn found(&mut self, swarm: &mut Swarm<Behaviour>, mate: PeerId, value: &[u8]) {
        if !self.dial {
            return;
        }
        if self.circuits {
            self.seek(swarm, mate);
            return;
        }
        for addr in addresses_in(value) {
            swarm.add_peer_address(mate, addr);
        }
        self.known.entry(mate).or_insert(false);
        self.look(swarm);
    }

    /// Asks where a mate is, which also dials it.
    fn seek(&mut self, swarm: &mut Swarm<Behaviour>, mate: PeerId) {
        if swarm.is_connected(&mate) || !self.seeking.insert(mate) {
            return;
        }
        let id = swarm.behaviour_mut().kad.get_closest_peers(mate);
        self.finds.insert(id, (mate, Instant::now()));
    }

    fn on_kad(&mut self, swarm: &mut Swarm<Behaviour>, event: kad::Event) {
        let kad::Event::OutboundQueryProgressed {
            id,
            result,
            step,
            stats,
        } = event
        else {
            return;
        };
        match result {
            kad::QueryResult::PutRecord(result) => {
                let ms = self.puts.remove(&id).map_or(0, |t| t.elapsed().as_millis());
                match result {
                    Ok(_) => emit("stored", json!({"ms": ms})),
                    Err(err) => emit("put_failed", json!({"ms": ms, "error": err.to_string()})),
                }
            }
            kad::QueryResult::GetRecord(Ok(kad::GetRecordOk::FoundRecord(found))) => {
                let ms = self.gets.get(&id).map_or(0, |t| t.elapsed().as_millis());
                // Clients ignore a record without publisher, and their own.
                let publisher = found.record.publisher;
                if let Some(mate) = publisher.filter(|p| p != swarm.local_peer_id()) {
                    emit(
                        "found",
                        json!({
                            "ms": ms, "peer": mate.to_string(), "from": found.peer.map(|p| p.to_string()),
                            "value": String::from_utf8_lossy(&found.record.value),
                        }),
                    );
                    self.found(swarm, mate, &found.record.value);
                } else if found.peer.is_some() && publisher.is_none() {
                    emit("found_without_publisher", json!({}));
                }
            }
            kad::QueryResult::GetRecord(_) if step.last => {
                let ms = self.gets.remove(&id).map_or(0, |t| t.elapsed().as_millis());
                emit("searched", json!({"ms": ms}));
            }
            kad::QueryResult::GetClosestPeers(result) => {
                let peers = match result {
                    Ok(ok) => ok.peers,
                    Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                if let Some((mate, began)) = self.finds.remove(&id) {
                    let connected = swarm.is_connected(&mate);
                    emit(
                        "sought",
                        json!({
                            "ms": began.elapsed().as_millis(), "peer": mate.to_string(), "connected": connected,
                            "answers": stats.num_successes(), "peers": peers.iter().map(|p| p.peer_id.to_string()).collect::<Vec<_>>(),
                        }),
                    );
                    self.seeking.remove(&mate);
                    if !connected && self.dial && self.circuits {
                        let via = self
                            .relay_addr
                            .clone()
                            .with(Protocol::P2pCircuit)
                            .with(Protocol::P2p(mate));
                        if let Err(err) =
                            swarm.dial(DialOpts::peer_id(mate).addresses(vec![via]).build())
                        {
                            emit(
                                "dial_failed",
                                json!({"peer": mate.to_string(), "error": err.to_string()}),
                            );
                        }
                    }
                }
            }
            _ => {}
        }
    }

    fn on_event(&mut self, swarm: &mut Swarm<Behaviour>, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => {
                emit("listening", json!({"addr": address.to_string()}))
            }
            SwarmEvent::ListenerClosed {
                addresses, reason, ..
            } => {
                // The reservation went with the relay: the next tick asks anew.
                if addresses.iter().any(is_circuit) {
                    self.reserved = false;
                }
                emit("listener_closed", json!({"reason": format!("{reason:?}")}));
            }
            SwarmEvent::ConnectionEstablished {
                peer_id,
                endpoint,
                connection_id,
                ..
            } => {
                let addr = endpoint.get_remote_address();
                emit(
                    "connected",
                    json!({
                        "peer": peer_id.to_string(), "addr": addr.to_string(), "relay": peer_id == self.relay_id,
                        "circuit": endpoint.is_relayed(), "dialer": endpoint.is_dialer(), "connection": connection_id.to_string(),
                    }),
                );
                if self.circuits && peer_id == self.relay_id {
                    swarm
                        .behaviour_mut()
                        .kad
                        .add_address(&peer_id, self.relay_addr.clone());
                    self.tick(swarm);
                }
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                num_established,
                connection_id,
                cause,
                ..
            } => emit(
                "closed",
                json!({
                    "peer": peer_id.to_string(), "left": num_established, "connection": connection_id.to_string(),
                    "cause": cause.map(|c| c.to_string()),
                }),
            ),
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => emit(
                "dial_failed",
                json!({
                    "peer": peer_id.map(|p| p.to_string()), "error": error.to_string(),
                }),
            ),
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received {
                peer_id,
                info,
                ..
            })) => {
                emit(
                    "identified",
                    json!({
                        "peer": peer_id.to_string(), "protocol_version": info.protocol_version, "agent_version": info.agent_version,
                        "observed": info.observed_addr.to_string(),
                        "listen_addrs": info.listen_addrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
                        "protocols": info.protocols.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    }),
                );
                if !self.circuits {
                    for addr in info.listen_addrs {
                        swarm.add_peer_address(peer_id, addr);
                    }
                } else if peer_id == self.relay_id && self.circuit && !self.reserved {
                    self.reserved = true;
                    if let Err(err) =
                        swarm.listen_on(self.relay_addr.clone().with(Protocol::P2pCircuit))
                    {
                        emit("reservation_failed", json!({"error": err.to_string()}));
                    }
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Kad(event)) => self.on_kad(swarm, event),
            SwarmEvent::Behaviour(BehaviourEvent::Relay(
                relay::client::Event::ReservationReqAccepted { limit, renewal, .. },
            )) => {
                emit(
                    "reserved",
                    json!({
                        "renewal": renewal, "bytes": limit.as_ref().and_then(|l| l.data_in_bytes()),
                        "seconds": limit.as_ref().and_then(|l| l.duration()).map(|d| d.as_secs()),
                    }),
                );
            }
            SwarmEvent::Behaviour(BehaviourEvent::Dcutr(event)) => emit(
                "punched",
                json!({
                    "peer": event.remote_peer_id.to_string(), "ok": event.result.is_ok(),
                    "error": event.result.err().map(|e| e.to_string()),
                }),
            ),
            SwarmEvent::Behaviour(BehaviourEvent::Sync(event)) => self.on_sync(swarm, event),
            _ => {}
        }
    }

    fn on_sync(
        &mut self,
        swarm: &mut Swarm<Behaviour>,
        event: request_response::Event<Vec<u8>, Vec<u8>>,
    ) {
        match event {
            request_response::Event::Message {
                message:
                    request_response::Message::Request {
                        request, channel, ..
                    },
                peer,
                ..
            } => {
                emit(
                    "received",
                    json!({"peer": peer.to_string(), "bytes": request.len()}),
                );
                let digest = Sha256::digest(&request).to_vec();
                let _ = swarm.behaviour_mut().sync.send_response(channel, digest); // the asker may be gone
            }
            request_response::Event::Message {
                message:
                    request_response::Message::Response {
                        request_id,
                        response,
                    },
                peer,
                ..
            } => {
                if let Some((began, digest, bytes)) = self.syncs.remove(&request_id) {
                    emit(
                        "synced",
                        json!({
                            "peer": peer.to_string(), "bytes": bytes, "ms": began.elapsed().as_millis(), "ok": digest == response,
                        }),
                    );
                }
            }
            request_response::Event::OutboundFailure { peer, error, .. } => {
                emit(
                    "sync_failed",
                    json!({"peer": peer.to_string(), "error": error.to_string()}),
                );
            }
            _ => {}
        }
    }

    fn on_command(
        &mut self,
        swarm: &mut Swarm<Behaviour>,
        line: &str,
    ) -> Result<(), Box<dyn Error>> {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["sync", peer, bytes] => self.sync(swarm, peer.parse()?, bytes.parse()?),
            ["probe", peer, bytes] => {
                let peer = peer.parse()?;
                if swarm.is_connected(&peer) {
                    self.sync(swarm, peer, bytes.parse()?);
                }
            }
            ["carry", peer, bytes] => {
                let peer = peer.parse()?;
                if swarm.is_connected(&peer) {
                    self.sync(swarm, peer, bytes.parse()?);
                } else {
                    emit("not_connected", json!({"peer": peer.to_string()}));
                }
            }
            ["find", peer] => {
                let peer = peer.parse()?;
                let id = swarm.behaviour_mut().kad.get_closest_peers(peer);
                self.finds.insert(id, (peer, Instant::now()));
            }
            ["dial", addr] => swarm.dial(addr.parse::<Multiaddr>()?)?,
            ["put", text] => {
                self.value = Some(text.to_string());
                self.tick(swarm);
            }
            _ => return Err(format!("unknown command {line:?}").into()),
        }
        Ok(())
    }
}

/// A quarter more or less: no two of the devices with circuits tick in step.
fn jittered(d: Duration) -> Duration {
    let random = std::hash::RandomState::new().hash_one(0) as f64 / u64::MAX as f64;
    d.mul_f64(0.75 + random / 2.0)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (mut relay_addr, mut code, mut device) = (None, String::new(), "device".to_string());
    let (mut tick, mut circuits, mut circuit, mut punch, mut dial) =
        (Duration::from_secs(30), false, false, false, true);
    let (mut listen, mut listens): (Vec<Multiaddr>, _) = (Vec::new(), true);
    let mut keypair = Keypair::generate_ed25519();
    for arg in std::env::args().skip(1) {
        let (name, value) = arg
            .split_once('=')
            .ok_or(format!("{arg:?} is not NAME=VALUE"))?;
        match name {
            "mode" if value == "deployed" => circuits = false,
            "mode" if value == "circuits" => circuits = true,
            "relay" => relay_addr = Some(value.parse::<Multiaddr>()?),
            "code" => code = value.to_string(),
            "device" => device = value.to_string(),
            "key" => keypair = Keypair::ed25519_from_bytes(Sha256::digest(value))?,
            "tick_ms" => tick = Duration::from_millis(value.parse()?),
            "listen" if value == "none" => listens = false,
            "listen" => listen.push(value.parse()?),
            "circuit" => circuit = value == "1",
            "dcutr" => punch = value == "1",
            "dial" => dial = value == "1",
            _ => return Err(format!("unknown argument {arg:?}").into()),
        }
    }
    if !circuits && (circuit || punch) {
        return Err("circuit and dcutr need mode=circuits".into());
    }
    let relay_addr = relay_addr.ok_or("relay is missing")?;
    let Some(Protocol::P2p(relay_id)) = relay_addr.iter().last() else {
        return Err("relay has no /p2p".into());
    };

    // The defaults of QUIC: idle timeout 10 s, keep-alive 5 s.
    let quic = SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_quic();
    let idle = |c: libp2p::swarm::Config| c.with_idle_connection_timeout(Duration::from_secs(60));
    let mut swarm = if circuits {
        quic.with_relay_client(noise::Config::new, yamux::Config::default)?
            .with_behaviour(|key, relay| Behaviour {
                relay: Some(relay).into(),
                dcutr: punch
                    .then(|| dcutr::Behaviour::new(key.public().to_peer_id()))
                    .into(),
                ..Behaviour::new(key, &device, None)
            })?
            .with_swarm_config(idle)
            .build()
    } else {
        let bootstrap = Some((relay_id, relay_addr.clone()));
        quic.with_behaviour(|key| Behaviour::new(key, &device, bootstrap))?
            .with_swarm_config(idle)
            .build()
    };

    emit(
        "started",
        json!({"peer": swarm.local_peer_id().to_string()}),
    );
    if listen.is_empty() && listens {
        listen.push("/ip4/0.0.0.0/udp/0/quic-v1".parse()?);
        listen.push("/ip6/::/udp/0/quic-v1".parse()?);
    }
    for addr in listen {
        swarm.listen_on(addr)?;
    }

    // The key holds the hash's bytes, not its text.
    let key = [b"/privstack/syncgroup/".as_slice(), &Sha256::digest(&code)].concat();
    let mut client = Client {
        relay_id,
        relay_addr,
        key: kad::RecordKey::new(&key),
        device,
        circuits,
        circuit,
        dial,
        reserved: false,
        value: None,
        seeking: HashSet::new(),
        known: HashMap::new(),
        puts: HashMap::new(),
        gets: HashMap::new(),
        finds: HashMap::new(),
        syncs: HashMap::new(),
    };
    let mut next_tick = tokio::time::Instant::now();
    let mut look = tokio::time::interval(LOOK);
    let mut commands = BufReader::new(tokio::io::stdin()).lines();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next_tick) => {
                client.tick(&mut swarm);
                next_tick += if circuits { jittered(tick) } else { tick };
            }
            _ = look.tick() => client.look(&mut swarm),
            event = swarm.select_next_some() => client.on_event(&mut swarm, event),
            line = commands.next_line() => match line? {
                Some(line) => client.on_command(&mut swarm, &line)?,
                None => return Ok(()),
            },
        }
    }
}
